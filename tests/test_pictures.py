"One picture in every kind of file that people have: it is read as that picture, or refused with a reason. The lessons are in the notebooks data.pixels, data.dicom and data.duplicates."
import io, json, os, signal, struct, subprocess, sys, time, zlib
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image, TiffImagePlugin

from conftest import ROOT, refused, run
from mmsn.data.cohort import Cohort
from mmsn.data.duplicates import fingerprints, same_pixels
from mmsn.data.images import check_image, inside, load_image
from mmsn.data.pixels import decode_picture, ends, full_range
from mmsn.prepare import main

CASES = Path(__file__).parent/'files'/'cases'
H, W = 40, 56
Y, X = np.mgrid[0:H, 0:W]
PICTURE = (20 + 2*X + 1.5*Y + 30*((X - 40)**2 + (Y - 10)**2 < 50)).astype(np.uint8)    # not symmetrical in any way
HOLE = X < W//2


def stretched(x):
    "The full range of an array as 0..255, the plain way."
    x = np.asarray(x, float)
    return np.rint((x - x.min())*255/np.ptp(x)).astype(np.uint8)


def png(bands, kind, depth=16, extra=(), size=None):
    "A PNG by hand: kind 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA; `extra` chunks stand before the pixels."
    chunk = lambda sort, data: struct.pack('>I', len(data)) + sort + data + struct.pack('>I', zlib.crc32(sort + data))
    if depth == 16: rows = [r.astype('>u2').tobytes() for r in bands]
    elif depth == 8: rows = [r.astype('u1').tobytes() for r in bands]
    else: rows = [np.packbits(np.unpackbits(r.astype('u1')[:, None], axis=1)[:, 8 - depth:].ravel()).tobytes() for r in bands]
    head = struct.pack('>IIBBBBB', *(size or bands.shape[1::-1]), depth, kind, 0, 0, 0)
    chunks = b''.join(chunk(sort, data) for sort, data in extra)
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunks + chunk(b'IDAT', zlib.compress(b''.join(b'\0' + r for r in rows)))
            + chunk(b'IEND', b''))


def tiff(x, photometric=1, order='<', sample=1, tags=(), bits=None, content=None):
    "A plain TIFF of one strip by hand; sample 1 unsigned, 2 signed, 3 floating."
    n = 1 if x.ndim == 2 else x.shape[2]
    content = x.astype(x.dtype.newbyteorder(order)).tobytes() if content is None else content
    rows = [(256, 4, x.shape[1]), (257, 4, x.shape[0]), (258, 3, bits or x.itemsize*8), (259, 3, 1), (262, 3, photometric), (273, 4, 0),
            (277, 3, n), (278, 4, x.shape[0]), (279, 4, len(content)), (339, 3, sample), *tags]
    at, later = 8 + 2 + 12*len(rows) + 4, b''
    if n > 1:                                         # several values do not fit into an entry
        later = b''.join(struct.pack(order + f'{n}H', *[v]*n) for v in (bits or x.itemsize*8, sample))
    def entry(t, k, v):
        if n > 1 and t in (258, 339): return struct.pack(order + 'HHII', t, 3, n, at + (2*n if t == 339 else 0))
        v = at + len(later) if t == 273 else v
        return struct.pack(order + 'HHI', t, k, 1) + (struct.pack(order + 'I', v) if k == 4 else struct.pack(order + 'HH', v, 0))
    head = {'<': b'II*\0', '>': b'MM\0*'}[order] + struct.pack(order + 'I', 8) + struct.pack(order + 'H', len(rows))
    return head + b''.join(entry(*r) for r in sorted(rows)) + b'\0'*4 + later + content


def saved(image, kind, **options):
    "The bytes of an image as Pillow saves it."
    with io.BytesIO() as f:
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(f, kind, **options)
        return f.getvalue()


def turned(orientation):
    "(the stored image, EXIF) of a camera that was held so."
    exif = Image.Exif(); exif[0x0112] = orientation
    back = {2: 'FLIP_LEFT_RIGHT', 3: 'ROTATE_180', 4: 'FLIP_TOP_BOTTOM', 5: 'TRANSPOSE', 6: 'ROTATE_90', 7: 'TRANSVERSE', 8: 'ROTATE_270'}.get(orientation)
    return (Image.fromarray(PICTURE).transpose(Image.Transpose[back]) if back else Image.fromarray(PICTURE)), exif


def spot(x, n=1, value=None):
    "`x` with n hot pixels in its middle."
    x = x.copy()
    x[20 + np.arange(n)//8, 20 + np.arange(n) % 8] = np.iinfo(x.dtype).max if value is None else value
    return x


DEEP = PICTURE.astype(np.uint16)*16                   # twelve bits in sixteen
FULL = PICTURE.astype(np.uint16)*257
OPAQUE, HALF = np.full((H, W), 65535, np.uint16), np.where(HOLE, 0, 65535).astype(np.uint16)
RGB = np.dstack([PICTURE]*3)
SHOWN = np.where(HOLE, 0, PICTURE).astype(np.uint8)
WHITE_UNDER = np.where(HOLE, 255, PICTURE).astype(np.uint8)
STRETCHED = stretched(PICTURE)
HIDDEN16 = np.where(HOLE, 0, np.rint(PICTURE*(255/PICTURE[~HOLE].max()))).astype(np.uint8)
GREY = Image.fromarray(PICTURE)


def palette(transparent=False):
    image = GREY.convert('P')
    if transparent:
        x = np.where(HOLE, 255, PICTURE).astype(np.uint8)
        image = Image.fromarray(x).convert('P'); image.info['transparency'] = 255
    return image


def right():
    "name -> (bytes, expected, most difference)"
    cases = {}
    for o in range(1, 9):
        image, exif = turned(o)
        for kind, options, most in (('JPEG', dict(quality=98), 6), ('PNG', {}, 0), ('WEBP', dict(lossless=True), 0), ('TIFF', {}, 0)):
            cases[f'orientation {o} {kind}'] = saved(image, kind, exif=exif, **options), PICTURE, most
        cases[f'orientation {o} deflated TIFF'] = saved(image, 'TIFF', exif=exif, compression='tiff_adobe_deflate'), PICTURE, 0
        deep = Image.fromarray(np.asarray(image).astype(np.uint16)*16)
        cases[f'orientation {o} 16-bit PNG'] = saved(deep, 'PNG', exif=exif), STRETCHED, 0
        cases[f'orientation {o} 16-bit colour TIFF'] = tiff(np.dstack([np.asarray(deep)]*3), 2, tags=[(274, 3, o)]), STRETCHED, 0
    for o in (0, 9, 77): cases[f'orientation {o}'] = saved(GREY, 'PNG', exif=turned(1)[1].tobytes().replace(b'\x01\x12\0\3\0\0\0\1\0\1', b'\x01\x12\0\3\0\0\0\1\0' + bytes([o]))), PICTURE, 0
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    cases['orientation in XMP'] = png(np.asarray(turned(6)[0]), 0, 8, [(b'iTXt', xmp)]), PICTURE, 0
    cases['damaged EXIF'] = saved(GREY, 'PNG', exif=b'Exif\0\0MM\0*\xff\xff\xff\xff'), PICTURE, 0
    # polarity and depth of TIFF
    for order, name in (('<', 'Intel'), ('>', 'Motorola')):
        cases[f'white at zero 8 {name}'] = tiff(255 - PICTURE, 0, order), PICTURE, 0
        cases[f'white at zero 16 {name}'] = tiff(65535 - FULL, 0, order), STRETCHED, 0
        cases[f'white at zero 12 in 16 {name}'] = tiff(4095 - DEEP, 0, order), STRETCHED, 0
        cases[f'white at zero signed 16 {name}'] = tiff((4095 - DEEP).astype(np.int16) - 2000, 0, order, 2), STRETCHED, 0
        cases[f'white at zero float {name}'] = tiff(1 - PICTURE/np.float32(256), 0, order, 3), STRETCHED, 1
        cases[f'int32 {name}'] = tiff((PICTURE.astype(np.int32) - 100)*8_000_000, 1, order, 2), STRETCHED, 0
        cases[f'float {name}'] = tiff(PICTURE.astype(np.float32)*3 - 500, 1, order, 3), STRETCHED, 0
        cases[f'int16 {name}'] = tiff(PICTURE.astype(np.int16)*100 - 9000, 1, order, 2), STRETCHED, 0
        cases[f'int8 {name}'] = tiff((PICTURE.astype(np.int16) - 128).astype(np.int8), 1, order, 2), PICTURE, 0
        cases[f'16 {name}'] = tiff(DEEP, 1, order), STRETCHED, 0
        cases[f'RGB 16 {name}'] = tiff(np.dstack([DEEP]*3), 2, order), STRETCHED, 0
        cases[f'RGBA 16 {name}'] = tiff(np.dstack([np.where(HOLE, 60000, DEEP)]*3 + [HALF]).astype(np.uint16), 2, order, tags=[(338, 3, 2)]), HIDDEN16, 0
        cases[f'CMYK 16 {name}'] = tiff(np.dstack([65535 - FULL]*3 + [0*FULL]).astype(np.uint16), 5, order), STRETCHED, 1
    cases['white at zero 32'] = tiff(2**32 - 1 - PICTURE.astype(np.uint32)*16_000_000, 0), STRETCHED, 0
    cases['uint32'] = tiff(PICTURE.astype(np.uint32)*16_000_000), STRETCHED, 0
    cases['uint32 above 2**31'] = tiff(2**31 + PICTURE.astype(np.uint32)*1000), STRETCHED, 0
    for packing in ('tiff_lzw', 'tiff_adobe_deflate', 'packbits'):
        cases[f'16 {packing}'] = saved(DEEP, 'TIFF', compression=packing), STRETCHED, 0
        cases[f'white at zero 16 {packing}'] = saved(65535 - DEEP, 'TIFF', compression=packing, tiffinfo={262: 0}), STRETCHED, 0
    # one hot pixel, a few, a dead one, a burned-in mark; a picture that is only wide keeps its ends
    for n in (1, 5, 16, 40): cases[f'{n} hot'] = saved(spot(DEEP, n), 'PNG'), STRETCHED, 255
    row = DEEP.copy(); row[20] = row[30, :20] = 65535
    cases['hot row'] = saved(row, 'PNG'), STRETCHED, 256
    dead = DEEP + 20_000; dead[:, 7] = 0; dead[25] = 65535
    cases['dead column, hot row'] = saved(dead, 'PNG'), STRETCHED, 256
    cases['dead pixel'] = saved(spot(DEEP + 20_000, 1, 0), 'PNG'), STRETCHED, 255
    cases['hot float'] = tiff(np.where((X == 3) & (Y == 3), 1e30, PICTURE).astype(np.float32), 1, '<', 3), STRETCHED, 255
    cases['14 of 16'] = saved(PICTURE.astype(np.uint16)*64, 'PNG'), STRETCHED, 0
    cases['16 of 16'] = saved(FULL, 'PNG'), STRETCHED, 0
    cases['10 of 16 with a floor'] = saved(PICTURE.astype(np.uint16)*4 + 60_000, 'PNG'), STRETCHED, 0
    # sixteen-bit colour and alpha
    cases['RGB 16'] = png(np.dstack([DEEP]*3), 2), STRETCHED, 0
    cases['RGB 16 full'] = png(np.dstack([FULL]*3), 2), STRETCHED, 0
    red = np.dstack([DEEP, 0*DEEP, 0*DEEP])
    cases['RGB 16 red'] = png(red, 2), STRETCHED, 0
    cases['RGBA 16 opaque'] = png(np.dstack([DEEP]*3 + [OPAQUE]), 6), STRETCHED, 0
    cases['RGBA 16 hole'] = png(np.dstack([np.where(HOLE, 65535, DEEP)]*3 + [HALF]), 6), HIDDEN16, 0
    cases['LA 16 hole'] = png(np.dstack([np.where(HOLE, 65535, DEEP), HALF]), 4), HIDDEN16, 0
    cases['LA 16, alpha of 12 bits'] = png(np.dstack([DEEP, OPAQUE//16]), 4), STRETCHED, 1
    cases['grey 16 with a transparent value'] = png(np.where(HOLE, 65535, DEEP), 0, extra=[(b'tRNS', b'\xff\xff')]), HIDDEN16, 0
    cases['RGB 16 with a transparent colour'] = png(np.dstack([np.where(HOLE, 65535, DEEP)]*3), 2, extra=[(b'tRNS', b'\xff'*6)]), HIDDEN16, 0
    # alpha of eight bits
    alpha = np.where(HOLE, 0, 255).astype(np.uint8)
    for kind, options in (('PNG', {}), ('TIFF', {}), ('WEBP', dict(lossless=True, exact=True))):
        cases[f'RGBA hole {kind}'] = saved(np.dstack([WHITE_UNDER]*3 + [alpha]), kind, **options), SHOWN, 0
    cases['LA hole'] = saved(Image.merge('LA', [Image.fromarray(WHITE_UNDER), Image.fromarray(alpha)]), 'PNG'), SHOWN, 0
    cases['RGBA opaque'] = saved(np.dstack([RGB, np.full((H, W), 255, np.uint8)]), 'PNG'), PICTURE, 0
    cases['RGBA half'] = saved(np.dstack([RGB, np.full((H, W), 128, np.uint8)]), 'PNG'), np.rint(PICTURE*(128/255)).astype(np.uint8), 1
    for kind in ('PNG', 'GIF', 'TIFF'): cases[f'palette {kind}'] = saved(palette(), kind), PICTURE, 0
    cases['palette hole'] = saved(palette(True), 'PNG', transparency=255), SHOWN, 0
    cases['palette hole GIF'] = saved(palette(True), 'GIF', transparency=255), SHOWN, 0
    cases['grey with a transparent value'] = png(WHITE_UNDER, 0, 8, [(b'tRNS', b'\0\xff')]), SHOWN, 0
    cases['RGB with a transparent colour'] = png(np.dstack([WHITE_UNDER]*3), 2, 8, [(b'tRNS', b'\0\xff'*3)]), SHOWN, 0
    four = PICTURE//16
    cases['4 bits'] = png(four, 0, 4), four*17, 0
    cases['2 bits'] = png(PICTURE//64, 0, 2), PICTURE//64*85, 0
    cases['4 bits with a transparent value'] = png(np.where(HOLE, 15, np.minimum(four, 14)), 0, 4, [(b'tRNS', b'\0\x0f')]), np.where(HOLE, 0, np.minimum(four, 14)*17), 0
    bits = np.asarray(GREY.convert('1'))
    cases['1 bit PNG'], cases['1 bit TIFF'] = (saved(GREY.convert('1'), 'PNG'), bits*255, 0), (saved(GREY.convert('1'), 'TIFF', compression='group4'), bits*255, 0)
    # colour spaces
    cases['CMYK TIFF'], cases['CMYK JPEG'] = (saved(Image.fromarray(RGB).convert('CMYK'), 'TIFF'), PICTURE, 1), (saved(Image.fromarray(RGB).convert('CMYK'), 'JPEG', quality=98), PICTURE, 6)
    cases['YCbCr TIFF'] = saved(Image.fromarray(RGB).convert('YCbCr'), 'TIFF'), PICTURE, 2
    cases['LAB TIFF'] = saved(Image.merge('LAB', [GREY, Image.new('L', (W, H), 128), Image.new('L', (W, H), 128)]), 'TIFF'), None, 0
    # ordinary files, and the other formats
    for kind in ('PNG', 'BMP', 'TIFF', 'PPM', 'GIF', 'JPEG2000'): cases[f'grey {kind}'] = saved(GREY, kind), PICTURE, 0
    for kind in ('PNG', 'BMP', 'TIFF', 'PPM', 'WEBP', 'JPEG2000'): cases[f'colour {kind}'] = saved(Image.fromarray(RGB), kind, **dict(lossless=True) if kind == 'WEBP' else {}), PICTURE, 0
    cases['PGM of 16 bits'] = b'P5 %d %d 65535\n' % (W, H) + DEEP.astype('>u2').tobytes(), STRETCHED, 0
    cases['PGM of 12 bits'] = b'P5 %d %d 4095\n' % (W, H) + DEEP.astype('>u2').tobytes(), STRETCHED, 1
    cases['JPEG 2000 of 16 bits'] = saved(DEEP, 'JPEG2000'), STRETCHED, 0
    plain = tiff(PICTURE)
    cases['multi-page TIFF with a thumbnail'] = pages([(PICTURE[::4, ::4], {254: 1}), (PICTURE, {})]), PICTURE, 0
    cases['multi-page TIFF with thumbnails behind'] = pages([(PICTURE, {}), (PICTURE[::2, ::2], {254: 1}), (PICTURE[::4, ::4], {254: 1})]), PICTURE, 0
    cases['BMP without alpha'] = bmp32(0), PICTURE, 0
    assert plain[:2] == b'II'
    return cases


def pages(parts):
    "A TIFF of several pages with tags."
    with io.BytesIO() as f:
        with TiffImagePlugin.AppendingTiffWriter(f, new=True) as t:
            for x, tags in parts:
                info = TiffImagePlugin.ImageFileDirectory_v2()
                for k, v in tags.items(): info[k] = v
                Image.fromarray(x.copy()).save(t, 'TIFF', tiffinfo=info); t.newFrame()
        return f.getvalue()


def bmp32(alpha):
    "A bitmap of 32 bits with masks, as screenshots have them."
    rows = np.dstack([RGB[::-1], np.full((H, W), alpha, np.uint8)]).tobytes()
    head = struct.pack('<IiiHHIIiiII', 108, W, H, 1, 32, 3, len(rows), 2835, 2835, 0, 0) + struct.pack('<IIII', 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b'\0'*52
    return b'BM' + struct.pack('<IHHI', 14 + len(head) + len(rows), 0, 0, 14 + len(head)) + head + rows


def wrong():
    "name -> (bytes, reason)"
    jpeg, flat = saved(GREY, 'JPEG'), [GREY, Image.fromarray(255 - PICTURE)]
    cases = {
        'two pages': (saved(flat[0], 'TIFF', save_all=True, append_images=flat[1:]), 'several pages'),
        'three pages, packed': (saved(flat[0], 'TIFF', save_all=True, append_images=flat[1:]*2, compression='tiff_lzw'), 'several pages'),
        'two frames GIF': (saved(flat[0], 'GIF', save_all=True, append_images=flat[1:]), 'several frames'),
        'two frames WEBP': (saved(flat[0], 'WEBP', save_all=True, append_images=flat[1:]), 'several frames'),
        'two frames PNG': (saved(flat[0], 'PNG', save_all=True, append_images=flat[1:]), 'several frames'),
        'transparent': (saved(np.dstack([RGB, 0*PICTURE]), 'PNG'), 'every pixel is transparent'),
        'transparent 16': (png(np.dstack([DEEP]*3 + [0*DEEP]), 6), 'every pixel is transparent'),
        'NaN': (tiff(np.where(HOLE, np.nan, PICTURE).astype(np.float32), 1, '<', 3), 'pixels that are not finite'),
        'infinite': (tiff(np.where(HOLE, np.inf, PICTURE).astype(np.float32), 1, '<', 3), 'pixels that are not finite'),
        'empty': (b'', 'zero bytes'), 'text': (b'<html>404</html>', 'not an image'), 'noise': (bytes(range(256))*8, 'not an image'),
        'PSD': (b'8BPS\0\1' + b'\0'*50, 'PSD: save it as PNG'), 'PDF': (b'%PDF-1.7 ' + b'\0'*50, 'PDF: save it as PNG'),
        'EPS': (b'%!PS-Adobe-3.0 EPSF-3.0\n', 'EPS: save it as PNG'), 'SVG': (b'<svg xmlns="x"/>', 'SVG: save it as PNG'),
        'ICO': (b'\0\0\1\0\1\0' + b'\0'*50, 'ICO: save it as PNG'), 'NumPy': (b'\x93NUMPY\1\0' + b'\0'*50, 'NumPy: save it as PNG'),
        'HEIC': (b'\0\0\0\x20ftypheic' + b'\0'*50, 'HEIC or video: save it as PNG'), 'AVIF': (b'\0\0\0\x20ftypavif' + b'\0'*50, 'AVIF: save it as PNG'),
        'zip': (b'PK\3\4' + b'\0'*50, 'zip: unpack it first'), 'gzip': (b'\x1f\x8b' + b'\0'*50, 'gzip: unpack it first'),
        'NIfTI': (b'\x5c\1\0\0' + b'\0'*340 + b'n+1\0' + b'\0'*50, 'NIfTI: save its slices as PNG'),
        'note of macOS': (b'\0\5\x16\7\0\2\0\0Mac OS X' + b'\0'*50, 'a note of macOS, not an image'),
        'LFS': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'a pointer of Git LFS, not the image: git lfs pull'),
        'TIFF of half floats': (tiff(PICTURE.astype(np.float16), 1, '<', 3), 'TIFF of a kind that Pillow does not read, or damaged'),
        '16-bit colour PPM': (b'P6 %d %d 65535\n' % (W, H) + np.dstack([DEEP]*3).astype('>u2').tobytes(), '16-bit colour of PPM: save it as PNG or TIFF'),
        '16-bit planes': (tiff(np.dstack([DEEP]*3), 2, tags=[(284, 3, 2)], content=np.stack([DEEP]*3).tobytes()), '16-bit colour in separate planes: save it as PNG'),
        'planes': (tiff(RGB, 2, tags=[(284, 3, 2)], content=np.stack([PICTURE]*3).tobytes()), 'TIFF whose planes are not complete'),
        'bomb PNG': (png(np.zeros((1, 1), np.uint8), 0, 8, size=(60_000, 60_000)), 'too large'),
        'bomb PNG of 16-bit colour': (png(np.zeros((1, 1, 3), np.uint16), 2, size=(10_000, 10_000)), 'too large'),
        'bomb TIFF': (tiff(PICTURE).replace(struct.pack('<HHII', 256, 4, 1, W), struct.pack('<HHII', 256, 4, 1, 3_000_000)), 'too large'),
        'bomb white at zero': (tiff(DEEP, 0, '>').replace(struct.pack('>HHII', 256, 4, 1, W), struct.pack('>HHII', 256, 4, 1, 3_000_000)), 'too large'),
        'bomb BMP': (bmp32(0).replace(struct.pack('<ii', W, H), struct.pack('<ii', 60_000, 60_000)), 'too large'),
        'uint32 Motorola': (tiff(PICTURE.astype(np.uint32), 1, '>'), 'TIFF of a kind that Pillow does not read, or damaged'),
        'double': (tiff(PICTURE.astype(np.float64), 1, '<', 3), 'TIFF of a kind that Pillow does not read, or damaged')}
    for kind in ('JPEG', 'PNG', 'TIFF', 'BMP', 'WEBP', 'GIF', 'PPM'):
        whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (H, W), np.uint8)), kind)
        cases[f'cut {kind}'] = whole[:len(whole)*2//3], None
    for name, whole in (('16-bit PNG', saved(DEEP, 'PNG')), ('16-bit RGB PNG', png(np.dstack([DEEP]*3), 2)), ('16-bit TIFF', tiff(DEEP)), ('LZW', saved(DEEP, 'TIFF', compression='tiff_lzw'))):
        cases[f'cut {name}'] = whole[:len(whole)*2//3], None
    assert jpeg[:2] == b'\xff\xd8'
    return cases


RIGHT, WRONG = right(), wrong()


@pytest.mark.parametrize('name', RIGHT)
def test_right(tmp_path, name):
    "Every kind of file gives the picture, whatever its name says."
    content, expected, most = RIGHT[name]
    (tmp_path/'a.png').write_bytes(content)
    image, kind, note = decode_picture(tmp_path/'a.png')
    x = np.asarray(image)
    assert x.dtype == np.uint8 and image.mode == 'L' and x.shape == (H, W)
    if expected is None: return np.testing.assert_array_less(.999, np.corrcoef(x.ravel(), PICTURE.ravel())[0, 1])
    off = np.abs(x.astype(int) - expected)
    if most >= 255:                                    # but for the outliers themselves, exactly
        assert 1 <= (off > 0).sum() <= (48 if most == 255 else 110) and note == 'outliers are clipped', note
    else: assert off.max() <= most, (off.max(), np.unravel_index(off.argmax(), off.shape))
    if most < 255: assert note in ('', 'its EXIF cannot be read'), note
    assert check_image(tmp_path/'a.png').reason == ''


@pytest.mark.parametrize('name', WRONG)
def test_wrong(tmp_path, name):
    "What cannot be read right is refused, with the reason where it is certain."
    content, reason = WRONG[name]
    (tmp_path/'a.png').write_bytes(content)
    found = check_image(tmp_path/'a.png').reason
    assert found and '\n' not in found and len(found) < 80
    assert reason in (None, found), found
    if name.startswith('bomb'): assert found == 'too large'
    if name.startswith('cut'): assert 'truncated' in found or 'damaged' in found or 'cannot be' in found, found


@pytest.mark.parametrize('name', list(RIGHT)[::2])
def test_cut_short(tmp_path, name):
    "A file that was cut off anywhere is refused, or is still the whole picture; the error stream stays empty."
    content = RIGHT[name][0]
    (tmp_path/'a').write_bytes(content)
    whole = np.asarray(decode_picture(tmp_path/'a')[0])
    for n in (len(content)//3, len(content)*4//5, len(content) - 60, len(content) - 1):
        (tmp_path/'a').write_bytes(content[:n])
        if check_image(tmp_path/'a').reason: continue
        x = np.asarray(decode_picture(tmp_path/'a')[0])
        assert x.shape == whole.shape and (x == whole).all(), n


def test_damaged(tmp_path, capfd):
    "600 files with a few wrong bytes: read or refused with a reason, nothing else, and nothing is printed."
    from mmsn.data.pixels import BadImage
    r, read = np.random.default_rng(0), 0
    for i in range(600):
        content = bytearray(RIGHT[list(RIGHT)[r.integers(len(RIGHT))]][0])
        for _ in range(r.integers(1, 6)): content[r.integers(len(content) if i % 2 else min(len(content), 400))] = r.integers(256)
        (tmp_path/'a').write_bytes(content)
        try: read += decode_picture(tmp_path/'a')[0].mode == 'L'
        except BadImage as e: assert e.reason and '\n' not in e.reason
    assert 0 < read < 600 and capfd.readouterr().err == ''


def test_phone(tmp_path):
    "A JPEG with a preview behind it is the picture, and noted."
    Image.fromarray(RGB).save(tmp_path/'a.jpg', 'MPO', save_all=True, append_images=[Image.fromarray(255 - RGB)], quality=98)
    x, kind, note = decode_picture(tmp_path/'a.jpg')
    assert np.abs(np.asarray(x).astype(int) - PICTURE).max() < 6 and note == 'the first of several frames'
    assert check_image(tmp_path/'a.jpg').note == note


@pytest.mark.parametrize('kind', ['TGA', 'SGI', 'IM', 'PCX', 'DDS', 'ICNS', 'XBM', 'SPIDER', 'MSP', 'EPS', 'AVIF', 'QOI'])
def test_other_formats_are_named(tmp_path, kind):
    image = Image.new('1', (32, 32), 1) if kind in ('XBM', 'MSP') else Image.fromarray(np.arange(1024).reshape(32, 32).astype(np.float32)) if kind == 'SPIDER' else Image.new('RGB', (32, 32), (9, 8, 7))
    path = tmp_path/f'a.{dict(SPIDER="spider").get(kind, kind.lower())}'
    try: image.save(path, kind)
    except (KeyError, OSError): pytest.skip(f'Pillow cannot write {kind} here')
    assert check_image(path).reason == f'{kind}: save it as PNG'


def test_cases_of_others():
    "The pictures of tests/files/cases: each is ref.png, in its own range where it has more than eight bits."
    truth = np.asarray(Image.open(CASES/'ref.png'))
    for name, most in (('exif3.jpg', 2), ('exif6.jpg', 2), ('exif6.png', 0), ('webp.webp', 4), ('ref.png', 0)):
        assert np.abs(np.asarray(decode_picture(CASES/name)[0]).astype(int) - truth).max() <= most, name
    for name in ('miniswhite16.tif', 'rgb16_12bit.png', 'la16_12bit.png'):
        assert np.abs(np.asarray(decode_picture(CASES/name)[0]).astype(int) - stretched(truth)).max() <= 1, name
    x, _, note = decode_picture(CASES/'g16_outlier.png')
    assert (np.asarray(x) != stretched(truth)).sum() == 1 and note == 'outliers are clipped'
    holes = np.asarray(decode_picture(CASES/'rgba_holes_white_under.png')[0])
    there = np.asarray(Image.open(CASES/'rgba_holes_white_under.png'))[..., 3] > 0
    assert (holes[there] == truth[there]).all() and not holes[~there].any()
    assert check_image(CASES/'multi.tif').reason == 'several pages'


def test_eight_bits_are_untouched(tmp_path):
    "Ordinary grey files give what Pillow gives, to the bit, also reduced."
    large = np.kron(PICTURE, np.ones((20, 20), np.uint8))
    for kind, options in (('JPEG', dict(quality=80)), ('JPEG', dict(quality=95, progressive=True)), ('PNG', {})):
        (tmp_path/'a').write_bytes(saved(large, kind, **options))
        image = Image.open(tmp_path/'a')
        assert (np.asarray(decode_picture(tmp_path/'a')[0]) == np.asarray(image)).all()
        image = Image.open(tmp_path/'a')
        if kind == 'JPEG': image.draft('L', (128, 128))
        w, h = image.size
        box = ((w - min(w, h))/2, (h - min(w, h))/2, (w + min(w, h))/2, (h + min(w, h))/2)
        assert (load_image(tmp_path/'a', 64) == np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR, box=box))).all()


def test_ends():
    "An outlier lies further beyond the body than the body is wide; nothing nearer is touched."
    body = np.arange(1000.)
    assert ends(body) == (0, 999) and ends(np.append(body, 1900)) == (0, 1900) and ends(np.append(body, 2900)) == (0, 999)
    assert ends(np.append(body, [-5000, 5000])) == (0, 999) and ends(np.full(9, 3.)) == (3, 3)
    assert ends(np.append(np.zeros(990), np.full(10, 7.))) == (0, 7)                     # nearly all of one value: no body
    assert full_range(np.r_[np.arange(300.), np.full(100, 60000.)].reshape(20, 20))[1] == 'few of its greys are left'


def test_no_file(tmp_path):
    (tmp_path/'folder.png').mkdir()
    os.mkfifo(tmp_path/'pipe.png')
    assert check_image(tmp_path/'folder.png').reason == 'no such file, but a folder of this name'
    assert check_image(tmp_path/'pipe.png').reason == 'no such file'
    assert check_image(tmp_path/('a'*300)).reason in ('no such file', 'cannot be opened (OSError)')
    assert check_image(tmp_path/'a\0b').reason in ('no such file', 'cannot be opened (ValueError)')


# the command

@pytest.fixture
def place(tmp_path, monkeypatch):
    "120 different pictures of 60 patients and their table."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'scans').mkdir()
    r = np.random.default_rng(0)
    for i in range(120): Image.fromarray(r.integers(0, 256, (16, 16), np.uint8)).save(tmp_path/'scans'/f'{i}.png')
    write(image=[f'{i}.png' for i in range(120)])
    return tmp_path


def write(**columns):
    n = len(columns['image'])
    pd.DataFrame(dict(patient=np.arange(n)//2, mass=np.arange(n) % 2) | columns).to_csv('scans.csv', index=False)


WORDS = ['images', 'scans.csv', 'scans', 'out', '--size', 16, '--subject', 'patient', '--labels', 'mass', '--workers', 1]


def prepared(*more):
    main([str(w) for w in [*WORDS, '--overwrite', *more]])
    return Cohort.open('out', verify=True)


def summary(): return pd.read_csv('out/summary.csv').set_index('what')['count']


def same_as_files(cohort, names):
    for i, name in enumerate(names): assert (cohort[i]['cxr'] == np.asarray(Image.open(Path('scans')/name))).all(), name


@pytest.mark.parametrize('change', [lambda n: n[:-4], lambda n: n.upper(), lambda n: '.\\' + n, lambda n: './' + n, lambda n: f' {n} ', lambda n: os.path.abspath('scans/' + n)])
def test_names_as_people_write_them(place, change):
    names = [f'{i}.png' for i in range(120)]
    write(image=[change(n) for n in names])
    cohort = prepared()
    same_as_files(cohort, names)
    assert not cohort.samples.image.str.startswith('/').any()


def test_endings_in_the_other_case(place):
    for i in range(60): Path(f'scans/{i}.png').rename(f'scans/{i}.PNG')
    same_as_files(prepared(), [f'{i}.{"PNG" if i < 60 else "png"}' for i in range(120)])
    write(image=[str(i) for i in range(120)])
    same_as_files(prepared(), [f'{i}.{"PNG" if i < 60 else "png"}' for i in range(120)])


def test_windows_folders_and_links(place):
    Path('scans/a').mkdir()
    for i in range(60): Path(f'scans/{i}.png').rename(f'scans/a/{i}.png')
    names = [f'a/{i}.png' if i < 60 else f'{i}.png' for i in range(120)]
    write(image=[n.replace('/', '\\') for n in names])
    same_as_files(prepared(), names)
    Path('real').mkdir(); Path('scans').rename('real/scans'); Path('scans').symlink_to('real/scans')
    write(image=[str((place/'real/scans'/n).resolve()) for n in names])          # absolute, by another name of the folder
    same_as_files(prepared(), names)


def test_guesses_are_refused(place, capsys):
    for i in range(120): Path(f'scans/{i}.jpg').write_bytes(Path(f'scans/{i}.png').read_bytes())
    write(image=[str(i) for i in range(120)])
    assert "image '0' may be 0.jpg or 0.png: write the ending" in refused(main, WORDS, capsys)
    Path('scans/7.jpg').unlink()
    same_as_files(prepared(), [f'{i}.png' for i in range(120)])                       # that counts which more have


def test_two_rows_for_one_file(place, capsys):
    write(image=[f'{i}.png' for i in range(119)] + ['7'])
    assert "holds 1 duplicate ids, such as '7.png' and '7' (rows 8 and 120), which are the file 7.png" in refused(main, WORDS, capsys)


@pytest.mark.parametrize('name', ['/etc/hostname', '../0.png', 'C:\\scans\\0.png', '\\\\server\\0.png'])
def test_paths_elsewhere(place, capsys, name):
    write(image=[name] + [f'{i}.png' for i in range(1, 120)])
    line = refused(main, WORDS, capsys)
    assert repr(name) in line and 'leaves the folder of images: refused' in line


def test_macos(place):
    for i in range(3): Path(f'scans/._{i}.png').write_bytes(b'\0\5\x16\7\0\2\0\0Mac OS X' + b'\0'*50)
    write(image=[f'._{i}.png' for i in range(3)] + ['.DS_Store'] + [f'{i}.png' for i in range(120)])
    cohort = prepared()
    assert len(cohort) == 120 and summary()['skipped: notes of macOS'] == 4 and summary()['rows'] == 124
    same_as_files(cohort, [f'{i}.png' for i in range(120)])


def test_nearly_all_fail(place, capsys):
    "Whatever the reason, one line that names it and the first file."
    for i in range(120): Path(f'scans/{i}.png').write_bytes(b'8BPS' + b'\0'*50)
    line = refused(main, WORDS, capsys)
    assert 'images cannot be used, more than 1% of 120 (PSD: save it as PNG: ' in line and 'the first is 0.png' in line
    assert not Path('.out-images').exists()
    write(image=[f'{i}.tif' for i in range(120)])
    assert '(no such file: ' in refused(main, WORDS, capsys)


def test_most_bad(place, capsys):
    for i in range(6): Path(f'scans/{i}.png').write_bytes(b'')
    refused(main, WORDS, capsys)
    assert len(prepared('--most-bad', .05)) == 114 and summary()['dropped: zero bytes'] == 6
    for share in ('2', '-1', 'nan'): assert '--most-bad should lie between 0 and 1' in refused(main, [*WORDS, '--overwrite', f'--most-bad={share}'], capsys)


def test_one_grey(place):
    for i in range(5): Image.new('L', (16, 16), 40).save(f'scans/{i}.png')
    cohort = prepared()
    assert len(cohort) == 120 and summary()['used, but one grey everywhere'] == 5
    assert pd.read_csv('out/noted.csv').path.tolist() == [f'{i}.png' for i in range(5)] and not Path('out/duplicates.csv').exists()


def test_copies_across_splits(place, capsys):
    "Equal bytes or equal pixels in another format: counted, named, refused above a share; within a split only counted."
    split = ['train', 'train', 'val', 'val', 'test', 'test']*20
    Path('scans/0.png').write_bytes(Path('scans/119.png').read_bytes())
    Image.open('scans/2.png').save('scans/119.bmp')
    write(image=[f'{i}.png' for i in range(119)] + ['119.bmp'], part=split, patient=np.arange(120)//2)
    line = refused(main, [*WORDS, '--split', 'part'], capsys)
    assert '2 of 120 images have the same pixels as an image of another split, more than 1%' in line and '2.png (val)' in line and '119.bmp (test)' in line
    assert pd.read_csv('out.duplicates.csv').path.tolist() == ['2.png', '119.bmp']
    prepared('--split', 'part', '--most-shared', 1)
    assert summary()['with the pixels of an image of another split'] == 2 and len(pd.read_csv('out/duplicates.csv')) == 2
    write(image=[f'{i}.png' for i in range(119)] + ['119.bmp'], part='train', patient=np.arange(120)//2)
    prepared('--split', 'part')
    assert summary()['with the pixels of another image'] == 2 and not Path('out/duplicates.csv').exists()


def test_fingerprints_of_many():
    "400,000 images are compared in the memory of their fingerprints."
    import tracemalloc
    prints = np.random.default_rng(0).integers(1, 2**63, (400_000, 2), np.uint64)
    prints[399_999] = prints[5]
    split = np.where(np.arange(400_000) % 3 == 2, 'test', 'train')
    tracemalloc.start()
    table = same_pixels(prints, split)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert table.row.tolist() == [5, 399_999] and peak < 80e6 and prints.nbytes == 6.4e6
    assert len(np.unique(fingerprints(np.random.default_rng(0).integers(0, 256, (500, 8, 8), np.uint8)), axis=0)) == 500


def test_reserved_names(place, capsys):
    for name in ('sample_id', 'split', 'cxr_index', 'image'):
        table = pd.read_csv('scans.csv')
        table = pd.DataFrame(dict(file=table.image, patient=table.patient) | {name: np.arange(120) % 2}); table.to_csv('other.csv', index=False)
        line = refused(main, ['images', 'other.csv', 'scans', 'out', '--id', 'file', '--subject', 'patient', '--labels', name], capsys)
        assert f'the label {name!r} of other.csv has the name of a column that every cohort has' in line


@pytest.mark.parametrize('ages, expected', [(['070Y', '003M', '002W', '001D'], [70, .25, .0383, .0027]), (['70,5', '3', '41,25'], [70.5, 3, 41.25]), (['70 years', '5 yrs'], [70, 5]),
                                            (['59', '061Y'], [59, 61])])
def test_ages(place, ages, expected):
    write(image=[f'{i}.png' for i in range(120)], age=(ages*120)[:120])
    x = prepared('--facts', 'age').array('demographics')
    assert np.allclose(x[:len(expected), 0], expected, atol=1e-4) and x.shape == (120, 1)


@pytest.mark.parametrize('ages', [['40', '90+'], ['40', 'unknown'], ['40', '>89'], ['1,234', '2,345'], ['70 kg', '80 kg']])
def test_ages_that_are_words(place, capsys, ages):
    write(image=[f'{i}.png' for i in range(120)], age=(ages*60)[:120])
    assert "column 'age' of scans.csv holds numbers and" in refused(main, [*WORDS, '--facts', 'age'], capsys)


def test_killed(tmp_path):
    "Killed half-way, and killed again, a preparation goes on; the cohort is that of one which nobody disturbed, and nothing is left."
    r = np.random.default_rng(0)
    (tmp_path/'scans').mkdir()
    for i in range(400): Image.fromarray(np.kron(r.integers(0, 256, (50, 50), np.uint8), np.ones((16, 16), np.uint8))).save(tmp_path/'scans'/f'{i}.jpg', quality=92)
    pd.DataFrame(dict(image=range(400), patient=np.arange(400)//2, mass=np.arange(400) % 2, age=np.arange(400) % 90)).to_csv(tmp_path/'scans.csv', index=False)
    command = lambda out: [sys.executable, '-m', 'mmsn.prepare', 'images', 'scans.csv', 'scans', out, '--size', '64', '--subject', 'patient', '--labels', 'mass', '--facts', 'age', '--workers', '2']
    work = tmp_path/'.out-images'
    for enough in (6, 20):
        program = subprocess.Popen(command('out'), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        while program.poll() is None and len(list(work.glob('*.npz'))) < enough: time.sleep(.02)
        os.killpg(program.pid, signal.SIGKILL)
        assert program.wait() == -signal.SIGKILL and not (tmp_path/'out').exists()
    last = subprocess.run(command('out'), cwd=tmp_path, capture_output=True, text=True)
    assert last.returncode == 0 and 'kept from an earlier run' in last.stdout, last.stderr
    once = subprocess.run(command('once'), cwd=tmp_path, capture_output=True, text=True)
    assert 'kept' not in once.stdout
    for p in sorted((tmp_path/'once').iterdir()):
        if p.name != 'cohort.json': assert p.read_bytes() == (tmp_path/'out'/p.name).read_bytes(), p.name
    metas = [json.loads((tmp_path/o/'cohort.json').read_text()) for o in ('out', 'once')]
    assert metas[0]['files'] == metas[1]['files'] and metas[0]['modalities'] == metas[1]['modalities']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['once', 'out', 'scans', 'scans.csv']


def test_two_at_one_place(place, capsys):
    "A second preparation of the same cohort is refused while the first is at work."
    from mmsn.data.folders import kept_blocks
    from mmsn.data.writer import CohortWriter
    code = '''import sys, time
from mmsn.data.folders import kept_blocks
from mmsn.data.writer import CohortWriter
with CohortWriter('out', 'a') as w, kept_blocks('out', w, 5): print('at work', flush=True); time.sleep(60)'''
    other = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'at work\n'
        assert f'process {other.pid} is at work on out' in refused(main, WORDS, capsys)
    finally: other.kill(); other.wait()
    assert len(prepared()) == 120
    assert not [p for p in place.iterdir() if p.name.startswith('.out')]


def test_inside_keeps_what_it_did():
    assert inside('images', 'p10\\a.jpg') == inside('images', os.path.abspath('images/p10/a.jpg')) == Path('images/p10/a.jpg')
