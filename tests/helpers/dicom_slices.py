"""CT slices as DICOM files, written by pydicom."""

import io

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless

AXIAL = [1, 0, 0, 0, 1, 0]


def stored(seed=0, height=8, width=12):
    """Returns the numbers in a file, uint16 of 12 bits."""
    return np.random.default_rng(seed).integers(0, 4096, [height, width], np.uint16)


def dicom(pixels=None, *, syntax=ExplicitVRLittleEndian, **changes):
    """Returns a CT slice as a file; changes are elements by keyword, and None takes one out."""
    pixels = stored() if pixels is None else pixels
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, "1.2.3"
    meta.TransferSyntaxUID = syntax
    elements = {
        "SOPClassUID": CTImageStorage, "SOPInstanceUID": "1.2.3", "Modality": "CT",
        "SeriesInstanceUID": "1.2.4", "InstanceNumber": 1, "ImagePositionPatient": [0, 0, 0],
        "ImageOrientationPatient": AXIAL, "Rows": pixels.shape[0], "Columns": pixels.shape[1],
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16,
        "BitsStored": 12, "HighBit": 11, "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "RescaleSlope": 1, "RescaleIntercept": -1024, **changes}
    dataset = Dataset()
    dataset.file_meta = meta
    for keyword, value in elements.items():
        if value is not None:
            setattr(dataset, keyword, value)
    if syntax == RLELossless:
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.PixelData = pixels.tobytes()
        dataset.compress(RLELossless)
    elif syntax.is_compressed:
        dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    else:
        dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(
            "<" if syntax.is_little_endian else ">")).tobytes()
    dataset["PixelData"].VR = "OB" if syntax.is_compressed else "OW"
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()
