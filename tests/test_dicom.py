"DICOM files written here with pydicom: every way to say the same picture is read as that picture. The lessons are in the notebook data.dicom."
import io, os, struct, sys, zlib

import numpy as np, pandas as pd, pytest
from PIL import Image

from conftest import refused
from mmsn.data.cohort import Cohort
from mmsn.data.images import check_image, load_image
from mmsn.data.pixels import full_range
from mmsn.prepare import main

pydicom = pytest.importorskip('pydicom')
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless,
                         JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, RLELossless)

H, W = 32, 48
Y, X = np.mgrid[0:H, 0:W]
PICTURE = (20 + 2*X + 1.5*Y + 30*((X - 40)**2 + (Y - 10)**2 < 50)).astype(np.uint16)
DEEP = PICTURE*16
STRETCHED = full_range(PICTURE)[0]
WINDOW = np.rint(np.clip((DEEP - (1600 - .5))/(2000 - 1) + .5, 0, 1)*255).astype(np.uint8)


def dicom(x, syntax=ExplicitVRLittleEndian, content=None, preamble=True, **tags):
    "The bytes of a DICOM file of the array `x`; tags replace what follows from it."
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.1.1'
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = '1.2.3.4'
    bits = x.itemsize*8
    ds.Rows, ds.Columns, ds.SamplesPerPixel = *x.shape[:2], 1 if x.ndim == 2 else 3
    ds.PhotometricInterpretation = 'MONOCHROME2' if x.ndim == 2 else 'RGB'
    if x.ndim == 3: ds.PlanarConfiguration = 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits, bits - 1, int(x.dtype.kind == 'i')
    for key, value in tags.items():
        if value is None: delattr(ds, key)
        else: setattr(ds, key, value)
    if 'FloatPixelData' not in tags and 'PixelData' not in tags:
        order = '>' if syntax == ExplicitVRBigEndian else '<'
        ds.PixelData = encapsulate([content]) if content is not None else x.astype(x.dtype.newbyteorder(order)).tobytes()
        if len(ds.PixelData) % 2: ds.PixelData += b'\0'
        ds['PixelData'].VR = 'OB' if bits == 8 or content is not None else 'OW'
        if content is not None: ds['PixelData'].is_undefined_length = True
    with io.BytesIO() as f:
        pydicom.dcmwrite(f, ds, enforce_file_format=preamble, **dict(implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian) if not preamble else {})
        return f.getvalue()


def packed(x, kind, **options):
    with io.BytesIO() as f:
        Image.fromarray(x).save(f, kind, **options)
        return f.getvalue()


def item(**tags):
    ds = Dataset()
    for k, v in tags.items(): setattr(ds, k, v)
    return ds


def lut(values, first, bits, vr='US', **tags):
    ds = item(**tags, LUTDescriptor=[len(values), first, bits], LUTData=list(map(int, values)))
    ds['LUTDescriptor'].VR, ds['LUTData'].VR = vr, 'US'
    return ds


TWELVE = dict(BitsStored=12, HighBit=11)
MONO1 = dict(PhotometricInterpretation='MONOCHROME1')
EIGHT = PICTURE.astype(np.uint8)
RGB = np.dstack([EIGHT]*3)
SIGNED = DEEP.astype(np.int16) - 2000
YBR = np.asarray(Image.fromarray(RGB).convert('YCbCr'))


def right():
    "name -> (bytes, expected, most difference)"
    cases = {}
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian):
        for bits in (10, 12, 14, 16): cases[f'{bits} bits {syntax.name}'] = dicom(PICTURE*2**(bits - 8), syntax, BitsStored=bits, HighBit=bits - 1), STRETCHED, 0
        cases[f'signed {syntax.name}'] = dicom(SIGNED, syntax, **TWELVE), STRETCHED, 0
        cases[f'8 bits {syntax.name}'] = dicom(EIGHT, syntax), EIGHT, 0
    cases['MONOCHROME1'] = dicom(4095 - DEEP, **TWELVE, **MONO1), STRETCHED, 1
    cases['MONOCHROME1, 8 bits'] = dicom(255 - EIGHT, **MONO1), EIGHT, 0
    cases['MONOCHROME1, signed'] = dicom(-SIGNED, **MONO1), STRETCHED, 1
    cases['window'] = dicom(DEEP, **TWELVE, WindowCenter=1600, WindowWidth=2000), WINDOW, 0
    cases['window, MONOCHROME1'] = dicom(DEEP, **TWELVE, **MONO1, WindowCenter=1600, WindowWidth=2000), 255 - WINDOW, 0
    cases['the first of two windows'] = dicom(DEEP, **TWELVE, WindowCenter=[1600, 40], WindowWidth=[2000, 80]), WINDOW, 0
    cases['window of rescaled numbers'] = dicom(DEEP, **TWELVE, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=2200.5 - .25, WindowWidth=3999), WINDOW, 1
    cases['rescale'] = dicom(DEEP, **TWELVE, RescaleSlope='0.5', RescaleIntercept='-1024'), STRETCHED, 0
    cases['rescale that inverts'] = dicom(4095 - DEEP, **TWELVE, RescaleSlope=-1, RescaleIntercept=0), STRETCHED, 0
    cases['rescale that inverts 8 bits'] = dicom(255 - EIGHT, RescaleSlope=-1, RescaleIntercept=0), EIGHT, 0
    cases['LINEAR_EXACT'] = dicom(DEEP, **TWELVE, WindowCenter=1600, WindowWidth=2000, VOILUTFunction='LINEAR_EXACT'), np.rint(np.clip((DEEP - 1600.)/2000 + .5, 0, 1)*255).astype(np.uint8), 0
    cases['SIGMOID'] = dicom(DEEP, **TWELVE, WindowCenter=1600, WindowWidth=2000, VOILUTFunction='SIGMOID'), np.rint(255/(1 + np.exp(-4*(DEEP - 1600.)/2000))).astype(np.uint8), 0
    cases['window without width'] = dicom(DEEP, **TWELVE, WindowCenter=1600, WindowWidth=0), STRETCHED, 0
    cases['window that shows nothing'] = dicom(DEEP, **TWELVE, WindowCenter=60000, WindowWidth=10), STRETCHED, 0
    table = 4095 - np.arange(4096)
    cases['VOI table'] = dicom(4095 - DEEP, **TWELVE, VOILUTSequence=Sequence([lut(table, 0, 12)])), np.rint(DEEP/4095*255).astype(np.uint8), 0
    cases['VOI table of signed numbers'] = dicom(SIGNED, BitsStored=12, HighBit=11, VOILUTSequence=Sequence([lut(np.arange(4096), -2000, 12, 'SS')])), np.rint(DEEP/4095*255).astype(np.uint8), 0
    cases['modality table'] = dicom(4095 - DEEP, **TWELVE, ModalityLUTSequence=Sequence([lut(table, 0, 16, ModalityLUTType='US')])), STRETCHED, 0
    # bits that belong to nobody, and padding
    cases['old overlay in the high bits'] = dicom(DEEP | (((X % 3) == 0)*0x8000).astype(np.uint16), **TWELVE), STRETCHED, 0
    cases['noise in the high bits of signed numbers'] = dicom(((SIGNED.view(np.uint16) & 0xFFF) | (((X % 3) == 0)*0x4000).astype(np.uint16)).view(np.int16), **TWELVE), STRETCHED, 0
    cases['left in the word'] = dicom(DEEP*16, BitsStored=12, HighBit=15), STRETCHED, 0
    framed = DEEP.copy(); framed[:, :4] = 0
    inner = np.zeros((H, W), np.uint8); inner[:, 4:] = full_range(PICTURE[:, 4:])[0]
    cases['padding'] = dicom(framed, **TWELVE, PixelPaddingValue=0), inner, 0
    away = 4095 - DEEP; away[:, :4] = 65535
    cases['padding beyond, MONOCHROME1'] = dicom(away, **MONO1, PixelPaddingValue=65535), inner, 1
    low = SIGNED.copy(); low[:, :4] = -2048
    padded = dicom(low, PixelPaddingValue=-2048)
    cases['signed padding'] = padded, inner, 0
    ranged = DEEP + 100; ranged[:, :4] = 7
    cases['a range of padding'] = dicom(ranged, PixelPaddingValue=0, PixelPaddingRangeLimit=50), inner, 0
    hot = DEEP.copy(); hot[20, 20] = 65535
    cases['hot pixel'] = dicom(hot), STRETCHED, 255
    # colour
    cases['RGB'] = dicom(RGB), EIGHT, 0
    planar = dicom(RGB, PlanarConfiguration=1, PixelData=np.moveaxis(RGB, -1, 0).tobytes())
    cases['planes'] = planar, EIGHT, 0
    cases['YBR_FULL'] = dicom(YBR, PhotometricInterpretation='YBR_FULL'), EIGHT, 1
    colours = np.arange(256)*256
    tables = {}
    for c in ('Red', 'Green', 'Blue'):
        tables[f'{c}PaletteColorLookupTableDescriptor'], tables[f'{c}PaletteColorLookupTableData'] = [256, 0, 16], (colours[::-1] + 128).astype('<u2').tobytes()
    cases['palette'] = dicom(255 - EIGHT, PhotometricInterpretation='PALETTE COLOR', **tables), EIGHT, 0
    cases['RGB of 12 bits'] = dicom(np.dstack([DEEP]*3), **TWELVE), STRETCHED, 0
    # compressed
    cases['JPEG'] = dicom(EIGHT, JPEGBaseline8Bit, packed(EIGHT, 'JPEG', quality=98)), EIGHT, 6
    cases['JPEG 2000'] = dicom(EIGHT, JPEG2000Lossless, packed(EIGHT, 'JPEG2000', no_jp2=True)), EIGHT, 0
    cases['JPEG 2000, 16 bits'] = dicom(DEEP, JPEG2000Lossless, packed(DEEP, 'JPEG2000', no_jp2=True)), STRETCHED, 0
    ds = pydicom.dcmread(io.BytesIO(dicom(DEEP, **TWELVE)))
    ds.compress(RLELossless)
    with io.BytesIO() as f:
        ds.save_as(f); cases['RLE'] = f.getvalue(), STRETCHED, 0
    # less or more than a file should have
    cases['float'] = dicom(PICTURE, BitsAllocated=32, BitsStored=None, HighBit=None, PixelRepresentation=None, FloatPixelData=PICTURE.astype('<f4').tobytes()), STRETCHED, 0
    cases['without preamble'] = dicom(DEEP, ImplicitVRLittleEndian, preamble=False, **TWELVE)[0:], STRETCHED, 0
    cases['functional groups'] = dicom(DEEP, **TWELVE, NumberOfFrames=1, SharedFunctionalGroupsSequence=Sequence([item(FrameVOILUTSequence=Sequence([item(WindowCenter=1600, WindowWidth=2000)]))])), WINDOW, 0
    return cases


RIGHT = right()


@pytest.mark.parametrize('name', RIGHT)
def test_right(tmp_path, name):
    content, expected, most = RIGHT[name]
    path = tmp_path/'image.dcm'
    path.write_bytes(content)
    size = dict(size=48, fit='squash')
    check = check_image(path)
    assert check.reason == '', check
    from mmsn.data.images import _decode
    x, kind, note = _decode(path)
    off = np.abs(np.asarray(x).astype(int) - expected)
    assert kind == 'DICOM' and x.size == (W, H)
    if most == 255: assert (off > 0).sum() == 1 and note == 'outliers are clipped'
    else: assert off.max() <= most, (off.max(), note)
    assert ('ignored' in note) == (name in ('window without width', 'window that shows nothing'))
    assert load_image(path, **size).shape == (48, 48)


def without():
    ds = pydicom.dcmread(io.BytesIO(dicom(DEEP)))
    del ds.PixelData
    with io.BytesIO() as f: ds.save_as(f); return f.getvalue()


def deflated_bomb():
    "A file of a megabyte that grows to more than a gigabyte."
    head = dicom(DEEP, DeflatedExplicitVRLittleEndian)
    start = 144 + struct.unpack('<I', head[140:144])[0]
    z = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    parts = [z.compress(bytes(2**24)) for _ in range(65)]
    return head[:start] + b''.join(parts) + z.flush()


WRONG = {
    'frames': (lambda: dicom(np.stack([DEEP]*2), Rows=H, Columns=W, SamplesPerPixel=1, PlanarConfiguration=None, PhotometricInterpretation='MONOCHROME2', NumberOfFrames=2), 'several frames'),
    'no pixels': (without, 'DICOM without pixels'),
    'cut': (lambda: dicom(DEEP)[:-500], 'truncated'),
    'bomb': (lambda: dicom(DEEP, Rows=60_000, Columns=60_000), 'too large'),
    'JPEG lossless': (lambda: dicom(DEEP, JPEGLosslessSV1, b'\xff\xd8\xff\xd9'), 'DICOM as JPEG Lossless, Non-Hierarchical, First-Order Prediction: pip install pylibjpeg pylibjpeg-libjpeg'),
    'JPEG-LS': (lambda: dicom(DEEP, JPEGLSLossless, b'\xff\xd8\xff\xd9'), 'DICOM as JPEG-LS Lossless Image Compression: pip install pyjpegls'),
    'damaged JPEG': (lambda: dicom(EIGHT, JPEGBaseline8Bit, b'\xff\xd8\xff\xd9'), None),
    'NaN': (lambda: dicom(PICTURE, BitsAllocated=32, BitsStored=None, HighBit=None, PixelRepresentation=None, FloatPixelData=np.full((H, W), np.nan, '<f4').tobytes()), 'pixels that are not finite'),
    'deflated bomb': (deflated_bomb, 'too large'),
    'garbage behind the letters': (lambda: b'\0'*128 + b'DICM' + bytes(range(256))*4, None),
    'nothing behind the letters': (lambda: b'\0'*128 + b'DICM', None)}


@pytest.mark.parametrize('name', WRONG)
def test_wrong(tmp_path, name):
    make, reason = WRONG[name]
    if name == 'JPEG lossless' and pytest.importorskip('pydicom').pixels.get_decoder(JPEGLosslessSV1).is_available: pytest.skip('the codec is there')
    if name == 'JPEG-LS' and pydicom.pixels.get_decoder(JPEGLSLossless).is_available: pytest.skip('the codec is there')
    (tmp_path/'a').write_bytes(make())
    found = check_image(tmp_path/'a').reason
    assert found and '\n' not in found and found == (reason or found), found


def folder(n=120):
    "Files without ending, a table, different pictures."
    os.mkdir('scans')
    r = np.random.default_rng(0)
    for i in range(n):
        with open(f'scans/1.2.840.{i}', 'wb') as f: f.write(dicom(r.integers(0, 4096, (16, 16), np.uint16), **TWELVE))
    pd.DataFrame(dict(image=[f'1.2.840.{i}' for i in range(n)], patient=np.arange(n)//2)).to_csv('scans.csv', index=False)


WORDS = ['images', 'scans.csv', 'scans', 'out', '--size', '16', '--subject', 'patient', '--workers', '1']


def test_by_the_command(tmp_path, monkeypatch, capsys):
    "Recognised by content, without an ending; with one that the table leaves out."
    monkeypatch.chdir(tmp_path)
    folder()
    main(WORDS)
    assert 'used, but' not in capsys.readouterr().out
    cohort = Cohort.open('out', verify=True)
    x = pydicom.dcmread('scans/1.2.840.7').pixel_array
    assert (cohort[7]['cxr'] == full_range(x)[0]).all() and len(cohort) == 120
    for p in list((tmp_path/'scans').iterdir()): p.rename(p.with_name(p.name + '.DCM'))
    main([*WORDS, '--overwrite'])
    assert (Cohort.open('out')[7]['cxr'] == full_range(x)[0]).all()


def test_without_pydicom(tmp_path, monkeypatch, capsys):
    "One line that says what to install; after that the same command works, though blocks were kept."
    monkeypatch.chdir(tmp_path)
    folder(1200)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, 'pydicom', None)
        assert check_image('scans/1.2.840.0').reason == 'DICOM: pip install mmsn[dicom]'
        assert '(DICOM: pip install mmsn[dicom]: ' in refused(main, WORDS, capsys)
    main(WORDS)
    assert len(Cohort.open('out')) == 1200 and not (tmp_path/'.out-images').exists()


def test_loaded_when_needed():
    "No command loads pydicom before it meets a DICOM file."
    import subprocess
    code = 'import sys, mmsn.prepare, mmsn.data.images; print("pydicom" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == 'False'
