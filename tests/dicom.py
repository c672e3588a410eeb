"""DICOM records made in memory, to be saved as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid


def dicom(pixels: np.ndarray, **attributes: object) -> Dataset:
    """An ultrasound record of one frame (H, W) or (H, W, 3), 8 or 16 bit."""
    record, colour = Dataset(), pixels.ndim == 3
    record.file_meta = FileMetaDataset()
    record.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    record.file_meta.MediaStorageSOPClassUID = record.SOPClassUID = UltrasoundImageStorage
    record.file_meta.MediaStorageSOPInstanceUID = record.SOPInstanceUID = generate_uid()
    record.Rows, record.Columns = pixels.shape[:2]
    record.SamplesPerPixel = 3 if colour else 1
    record.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        record.PlanarConfiguration = 0
    record.BitsAllocated = record.BitsStored = 8 * pixels.itemsize
    record.HighBit, record.PixelRepresentation = record.BitsAllocated - 1, 0
    record.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        setattr(record, name, value)
    return record


def region(centimetres: float, **attributes: object) -> Dataset:
    found = Dataset()
    found.RegionDataType = found.RegionSpatialFormat = 1
    found.PhysicalUnitsXDirection = found.PhysicalUnitsYDirection = 3
    found.PhysicalDeltaX = found.PhysicalDeltaY = centimetres
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


def save(record: Dataset, path: Path) -> Path:
    record.save_as(path, enforce_file_format=True)
    return path
