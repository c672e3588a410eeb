"""Labelled ultrasound: the phantom, the HC18 challenge, folders; splits and augmentation."""

DATA_HELP = "phantom[:LENGTH], hc18:DIR, planes:DIR, isic:DIR, folder:DIR, or several joined by commas"
