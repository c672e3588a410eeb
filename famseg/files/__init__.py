"""Reading and writing files: images, DICOM, masks, tables. Errors name the file, writes are atomic."""
