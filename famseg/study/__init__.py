"""A study: several training runs that differ in one thing each, on the same images and budget, and their table."""
