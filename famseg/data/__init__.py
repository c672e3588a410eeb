"""Labelled ultrasound: the phantom, the HC18 challenge, folders; splits and augmentation."""
