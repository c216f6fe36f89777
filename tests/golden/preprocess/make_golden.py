"""Writes the golden data of services/vision/tests/preprocess beside itself. README.md says how to run it and what it writes."""
import io
import json
import pathlib
import struct
import zlib

import blake3
import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.models.idefics2.image_processing_idefics2 import Idefics2ImageProcessor, convert_to_rgb

HERE = pathlib.Path(__file__).parent
FILES = HERE / "files"
RNG = np.random.default_rng(20240611)
WIDTH, HEIGHT = 13, 9
PATCH = 14


def digest(array):
    return blake3.blake3(np.ascontiguousarray(array).tobytes()).hexdigest()


# Files of every format and mode, and the RGB that the reference makes of them.


def noise(width, height, channels):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(width, height, channels=3):
    y, x = np.mgrid[0:height, 0:width]
    planes = [128 + 90 * np.sin(x / 9 + c) + 30 * np.cos(y / 7 + 2 * c) for c in range(channels)]
    return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)


def picture(array):
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def reference_rgb(data):
    return np.array(convert_to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
EXIF_6 = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


def pack(values, bits):
    if bits >= 8:
        return b"".join(int(v).to_bytes(bits // 8, "big") for v in values)
    text = "".join(format(int(v), f"0{bits}b") for v in values)
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(color_type, bits, interlaced=False, before=b"", after=b"", samples=None):
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type]
    if samples is None:
        samples = RNG.integers(0, min(2**bits, 20) if color_type == 3 else 2**bits, (HEIGHT, WIDTH, channels))
    if color_type == 3:
        before = png_chunk(b"PLTE", noise(min(2**bits, 20), 1, 3).tobytes()) + before
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)) if interlaced else ((0, 0, 1, 1),)
    raw = b""
    for x, y, dx, dy in passes:
        for row in samples[y::dy, x::dx]:
            raw += b"\0" + pack(row.flatten(), bits) if row.size else b""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, color_type, 0, 0, interlaced)
    chunks = png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", zlib.compress(raw, 9)) + after
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b""), samples


def gif(screen, frame, indices, palette, local=None, transparent=None, interlaced=False):
    size = lambda colors: (len(colors) // 3).bit_length() - 2
    out = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80 | size(palette), 5, 0) + palette
    if transparent is not None:
        out += b"\x21\xf9\x04" + struct.pack("<BHB", 1, 0, transparent) + b"\0"
    out += b"," + struct.pack("<HHHHB", *frame, (0x80 | size(local) if local else 0) | (0x40 if interlaced else 0)) + (local or b"")
    # LZW that never compresses: a clear code in time keeps all codes at nine bits.
    codes = [code for at in range(0, len(indices), 200) for code in [256, *indices[at : at + 200]]] + [257]
    stream = sum(int(code) << (9 * at) for at, code in enumerate(codes))
    stream = stream.to_bytes((9 * len(codes) + 7) // 8, "little")
    blocks = b"".join(bytes([len(stream[at : at + 255])]) + stream[at : at + 255] for at in range(0, len(stream), 255))
    return out + b"\x08" + blocks + b"\0;"


def bmp(bits, row_bytes, compression=0, masks=(), palette=b"", header=40, top_down=False, data=None):
    if data is None:
        data = b"".join(noise(row_bytes, 1, 1).tobytes() + b"\0" * (-row_bytes % 4) for _ in range(HEIGHT))
    masks = struct.pack(f"<{len(masks)}I", *masks)
    if header == 12:
        info = struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, bits)
    else:
        height = -HEIGHT if top_down else HEIGHT
        info = struct.pack("<IiiHHIIiiII", header, WIDTH, height, 1, bits, compression, len(data), 2835, 2835, len(palette) // 4, 0)
        info += masks + b"\0" * max(0, header - 40 - len(masks))
    offset = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + info + palette + data


def tiff(bits, photometric, samples, big_endian, extra=None, color_map=None, planar=1):
    order = ">" if big_endian else "<"
    data = noise((WIDTH * bits + 7) // 8 * HEIGHT if samples == 1 else WIDTH * HEIGHT * samples * bits // 8, 1, 1).tobytes()
    strips = samples if planar == 2 else 1
    tags = {256: (3, [WIDTH]), 257: (3, [HEIGHT]), 258: (3, [bits] * samples), 259: (3, [1]), 262: (3, [photometric]), 273: (4, [0] * strips)}
    tags |= {277: (3, [samples]), 278: (3, [HEIGHT]), 279: (4, [len(data) // strips] * strips), 284: (3, [planar])}
    tags |= {338: (3, extra)} if extra else {}
    tags |= {320: (3, color_map)} if color_map else {}
    end = 8 + 2 + len(tags) * 12 + 4
    behind = sum(size for kind, values in tags.values() if (size := len(values) * (2 if kind == 3 else 4)) > 4)
    tags[273] = (4, [end + behind + strip * (len(data) // strips) for strip in range(strips)])
    entries, far = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        entries += struct.pack(f"{order}HHI", tag, kind, len(values))
        if len(packed) <= 4:
            entries += packed.ljust(4, b"\0")
        else:
            entries += struct.pack(f"{order}I", end + len(far))
            far += packed
    head = (b"MM\0*" if big_endian else b"II*\0") + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + struct.pack(f"{order}I", 0) + far + data


def webp(chunks):
    body = b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) & 1) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def lossless_chunk(image):
    """The VP8L chunk of a WebP file, which starts right behind the file's header or behind VP8X."""
    data = saved(image, "WEBP", lossless=True, exact=True)
    at = data.find(b"VP8L")
    return data[at : at + 8 + struct.unpack("<I", data[at + 4 : at + 8])[0]]


def u24(value):
    return struct.pack("<I", value)[:3]


def animated_webp(flags, blend, image):
    frame = u24(2) + u24(1) + u24(WIDTH - 1) + u24(HEIGHT - 1) + u24(100) + bytes([blend]) + lossless_chunk(image)
    canvas = bytes([flags | 2, 0, 0, 0]) + u24(WIDTH + 9) + u24(HEIGHT + 7)
    return webp([(b"VP8X", canvas), (b"ANIM", bytes([10, 200, 30, 128, 0, 0])), (b"ANMF", frame)])


def lossless_files():
    """Name to (bytes, expected RGB): None where the reference is right."""
    files = {}
    rgb, rgba, gray = picture(noise(WIDTH, HEIGHT, 3)), picture(noise(WIDTH, HEIGHT, 4)), picture(noise(WIDTH, HEIGHT, 1))
    gray_alpha = Image.merge("LA", (gray, picture(noise(WIDTH, HEIGHT, 1))))
    cmyk = Image.merge("CMYK", [picture(noise(WIDTH, HEIGHT, 1)) for _ in range(4)])
    palette = picture(smooth(WIDTH, HEIGHT)).quantize(16)
    modes = {"rgb": rgb, "rgba": rgba, "l": gray, "la": gray_alpha, "1": gray.convert("1"), "p": palette}

    for color_type, depths in ((0, (1, 2, 4, 8, 16)), (2, (8, 16)), (3, (1, 2, 4, 8)), (4, (8, 16)), (6, (8, 16))):
        for bits in depths:
            for interlaced in (False, True):
                transparent = {0: png_chunk(b"tRNS", struct.pack(">H", 1 if bits < 16 else 0)), 3: png_chunk(b"tRNS", bytes([0, 100]))}
                transparent[2] = png_chunk(b"tRNS", struct.pack(">HHH", 1, 1, 1))
                for trns in (False, True) if color_type in transparent and not interlaced else (False,):
                    data, samples = png(color_type, bits, interlaced, before=transparent[color_type] if trns else b"")
                    expected = None
                    if (color_type, bits) == (0, 16):
                        # Pillow 11.3 clips 16-bit gray to 255 instead of scaling it. Here its high byte counts.
                        high = (samples >> 8).astype(np.uint8)
                        expected = np.repeat(np.where((samples == 0) & trns, 255, high).astype(np.uint8), 3, -1)
                    files[f"color{color_type}_{bits}bit{'_interlaced' * interlaced}{'_trns' * trns}.png"] = (data, expected)
    samples = noise(WIDTH, HEIGHT, 1)
    samples[2, 3] = 7
    files["gray_trns_used.png"] = (png(0, 8, before=png_chunk(b"tRNS", struct.pack(">H", 7)), samples=samples)[0], None)
    files["exif_before_pixels.png"] = (png(2, 8, before=png_chunk(b"eXIf", EXIF_6))[0], None)
    files["exif_behind_pixels.png"] = (png(2, 8, after=png_chunk(b"eXIf", EXIF_6))[0], None)
    files["xmp_orientation.png"] = (png(2, 8, before=png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP))[0], None)
    frames = [picture(noise(WIDTH, HEIGHT, 3)) for _ in range(2)]
    files["animated.png"] = (saved(rgb, "PNG", save_all=True, append_images=frames), None)
    files["animated_default_image.png"] = (saved(rgb, "PNG", save_all=True, default_image=True, append_images=frames), None)

    for value in range(1, 9):
        files[f"orientation{value}.png"] = (saved(rgb, "PNG", exif=orientation(value)), None)
        files[f"orientation{value}.tif"] = (saved(rgb, "TIFF", tiffinfo={274: value}), None)
        files[f"orientation{value}.webp"] = (saved(rgb, "WEBP", lossless=True, exif=orientation(value)), None)
    files["orientation9.png"] = (saved(rgb, "PNG", exif=orientation(9)), None)
    files["xmp_orientation.webp"] = (saved(rgb, "WEBP", lossless=True, xmp=XMP), None)
    files["xmp_orientation.tif"] = (saved(rgb, "TIFF", tiffinfo={700: XMP}), None)

    for name, image in modes.items():
        if name != "la":
            files[f"mode_{name}.bmp"] = (saved(image, "BMP"), None)
        files[f"mode_{name}.gif"] = (saved(image, "GIF"), None)
        files[f"mode_{name}_deflate.tif"] = (saved(image, "TIFF", compression="tiff_adobe_deflate"), None)
        if name != "1":
            files[f"mode_{name}.webp"] = (saved(image, "WEBP", lossless=True, exact=True), None)
    for compression in ("tiff_lzw", "packbits"):
        files[f"rgb_{compression}.tif"] = (saved(rgb, "TIFF", compression=compression), None)
    files["predictor.tif"] = (saved(rgb, "TIFF", compression="tiff_lzw", tiffinfo={317: 2}), None)
    files["group4.tif"] = (saved(modes["1"], "TIFF", compression="group4"), None)
    files["cmyk.tif"] = (saved(cmyk, "TIFF"), None)
    for width, height in ((1, 1), (1, 7), (7, 1)):
        for kind, suffix, options in (("PNG", "png", {}), ("BMP", "bmp", {}), ("GIF", "gif", {}), ("TIFF", "tif", {}), ("WEBP", "webp", {"lossless": True})):
            files[f"size{width}x{height}.{suffix}"] = (saved(picture(noise(width, height, 3)), kind, **options), None)

    for big_endian in (False, True):
        end = "be" if big_endian else "le"
        for bits in (1, 2, 4, 8):
            files[f"white_is_zero_{bits}bit_{end}.tif"] = (tiff(bits, 0, 1, big_endian), None)
            files[f"black_is_zero_{bits}bit_{end}.tif"] = (tiff(bits, 1, 1, big_endian), None)
            color_map = RNG.integers(0, 65536, 3 * 2**bits).tolist() if bits < 8 or big_endian else None
            if color_map:
                files[f"palette_{bits}bit_{end}.tif"] = (tiff(bits, 3, 1, big_endian, color_map=color_map), None)
        files[f"rgb_16bit_{end}.tif"] = (tiff(16, 2, 3, big_endian), None)
        files[f"rgb_planar_{end}.tif"] = (tiff(8, 2, 3, big_endian, planar=2), None)
        files[f"cmyk_16bit_{end}.tif"] = (tiff(16, 5, 4, big_endian), None)
        for extra in (1, 2):
            files[f"rgba_8bit_extra{extra}_{end}.tif"] = (tiff(8, 2, 4, big_endian, extra=[extra]), None)
        files[f"rgba_16bit_{end}.tif"] = (tiff(16, 2, 4, big_endian, extra=[2]), None)

    palette, local = noise(16, 1, 3).tobytes(), noise(8, 1, 3).tobytes()
    ramp = bytes(value for value in range(16) for _ in range(3))
    indices = lambda count, colors=16: RNG.integers(0, colors, count).tolist()
    files["partial.gif"] = (gif((12, 10), (3, 2, 5, 4), indices(20), palette), None)
    files["partial_transparent.gif"] = (gif((12, 10), (3, 2, 5, 4), indices(20), palette, transparent=2), None)
    files["over_the_edge.gif"] = (gif((12, 10), (9, 8, 5, 4), indices(20), palette), None)
    files["local_palette.gif"] = (gif((12, 10), (3, 2, 5, 4), indices(20, 8), palette, local=local), None)
    files["index_past_palette.gif"] = (gif((5, 4), (0, 0, 5, 4), indices(20, 256), palette), None)
    files["index_past_gray_ramp.gif"] = (gif((5, 4), (0, 0, 5, 4), indices(20, 256), ramp), None)
    files["transparent_past_palette.gif"] = (gif((7, 9), (1, 0, 5, 4), indices(20), palette, transparent=77), None)
    files["interlaced.gif"] = (gif((5, 9), (0, 0, 5, 9), indices(45), palette, interlaced=True), None)
    files["animated.gif"] = (saved(rgb, "GIF", save_all=True, append_images=frames), None)

    quads = b"".join(noise(1, 1, 3).tobytes() + b"\0" for _ in range(16))
    files["rgb555.bmp"] = (bmp(16, WIDTH * 2), None)
    files["rgb555_masks.bmp"] = (bmp(16, WIDTH * 2, 3, (0x7C00, 0x3E0, 0x1F)), None)
    files["rgb565_masks.bmp"] = (bmp(16, WIDTH * 2, 3, (0xF800, 0x7E0, 0x1F)), None)
    files["rgbx.bmp"] = (bmp(32, WIDTH * 4), None)
    files["rgba_v4.bmp"] = (bmp(32, WIDTH * 4, 3, (0xFF0000, 0xFF00, 0xFF, 0xFF000000), header=108), None)
    files["rgba_v5.bmp"] = (bmp(32, WIDTH * 4, 3, (0xFF0000, 0xFF00, 0xFF, 0xFF000000), header=124), None)
    files["top_down.bmp"] = (bmp(24, WIDTH * 3, top_down=True), None)
    files["os2.bmp"] = (bmp(24, WIDTH * 3, header=12), None)
    files["palette_4bit.bmp"] = (bmp(4, (WIDTH + 1) // 2, palette=quads), None)
    files["palette_1bit.bmp"] = (bmp(1, (WIDTH + 7) // 8, palette=quads[:8]), None)
    runs = b"".join(bytes([6, 1, 0, 5, 2, 3, 4, 5, 6, 0, 2, 9, 0, 0]) for _ in range(HEIGHT))[:-2] + b"\0\1"
    files["rle8.bmp"] = (bmp(8, 0, 1, palette=quads, data=runs), None)

    for alpha in (False, True):
        for name, image in (("rgb", rgb), ("rgba", rgba)):
            flags = 0x10 if alpha else 0
            files[f"still_{name}_flag{int(alpha)}.webp"] = (
                webp([(b"VP8X", bytes([flags, 0, 0, 0]) + u24(WIDTH - 1) + u24(HEIGHT - 1)), (b"VP8L", lossless_chunk(image)[8:])]),
                None,
            )
            for blend in (0, 2):
                files[f"animated_{name}_flag{int(alpha)}_blend{blend}.webp"] = (animated_webp(flags, blend, image), None)
    return files


def lossy_files():
    files = {}
    image = picture(smooth(40, 27))
    for sampling in (0, 1, 2):
        for progressive in (False, True):
            files[f"sampling{sampling}{'_progressive' * progressive}.jpg"] = saved(image, "JPEG", quality=90, subsampling=sampling, progressive=progressive)
    for value in range(1, 9):
        files[f"orientation{value}.jpg"] = saved(picture(smooth(16, 11)), "JPEG", quality=95, subsampling=0, exif=orientation(value))
    files["xmp_orientation.jpg"] = saved(picture(smooth(16, 11)), "JPEG", quality=95, subsampling=0, xmp=XMP)
    files["gray.jpg"] = saved(picture(smooth(40, 27, 1)), "JPEG", quality=90)
    files["rgb.jpg"] = saved(image, "JPEG", quality=90, keep_rgb=True)
    files["restart.jpg"] = saved(image, "JPEG", quality=90, restart_marker_blocks=2)
    files["size1x1.jpg"] = saved(picture(smooth(1, 1)), "JPEG", quality=95)
    files["size1x33.jpg"] = saved(picture(smooth(1, 33)), "JPEG", quality=95, subsampling=0)
    files["size33x1.jpg"] = saved(picture(smooth(33, 1)), "JPEG", quality=95, subsampling=0)
    inks = Image.merge("CMYK", [picture(smooth(40, 27, 4)[..., c : c + 1]) for c in range(4)])
    adobe = saved(inks, "JPEG", quality=95)
    at = adobe.find(b"Adobe")
    files["cmyk_adobe.jpg"] = adobe
    files["cmyk_bare.jpg"] = adobe[: at - 4] + adobe[at - 2 + struct.unpack(">H", adobe[at - 2 : at])[0] :]
    files["ycck.jpg"] = adobe[: at + 11] + b"\x02" + adobe[at + 12 :]
    files["lossy.webp"] = saved(image, "WEBP", quality=70)
    files["lossy_alpha.webp"] = saved(picture(smooth(40, 27, 4)), "WEBP", quality=70)
    files["jpeg.tif"] = saved(image, "TIFF", compression="jpeg")
    return files


# Resizing, splitting and normalising of generated pictures.


def generated(width, height):
    """Squares of noise and of gradients in turn; `generated` in tests/preprocess/reference.rs is the same in Rust."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3].astype(np.uint32)
    h = x * np.uint32(0x9E3779B1) + y * np.uint32(0x85EBCA77) + c * np.uint32(0xC2B2AE3D) + np.uint32(width * 31 + height)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x2C1B3C6D)
    h ^= h >> np.uint32(12)
    h *= np.uint32(0x297A2D39)
    h ^= h >> np.uint32(15)
    gradient = (x * np.uint32(3) + y * np.uint32(5) + c * np.uint32(160)) >> np.uint32(2)
    is_noise = ((x >> np.uint32(4)) ^ (y >> np.uint32(4))) & np.uint32(1)
    return (np.where(is_noise == 1, h, gradient) & np.uint32(255)).astype(np.uint8)


class Processor(Idefics2ImageProcessor):
    """The reference, but for edges of one pixel: their empty half makes it fail, so here it is that pixel."""

    def _crop(self, im, w1, h1, w2, h2, input_data_format=None):
        return im[h1 : max(h2, h1 + 1), w1 : max(w2, w1 + 1)]


def patches(array):
    rows, cols = array.shape[0] // PATCH, array.shape[1] // PATCH
    whole = array[: rows * PATCH, : cols * PATCH].reshape(rows, PATCH, cols, PATCH, 3)
    return whole.transpose(0, 2, 4, 1, 3)


def resize_case(width, height, split=False, longest=980, shortest=378):
    processor = Processor(do_image_splitting=split, size={"longest_edge": longest, "shortest_edge": shortest}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    # Told the layout, or a picture of three rows counts as one of three channels.
    layout = {"input_data_format": "channels_last", "return_tensors": "np"}
    image = [generated(width, height)]
    batch = processor.preprocess(image, **layout)
    raw = processor.preprocess(image, do_rescale=False, do_normalize=False, do_pad=False, **{**layout, "return_tensors": None})["pixel_values"][0]
    grids = []
    for pixels, values, mask in zip(raw, batch["pixel_values"][0], batch["pixel_attention_mask"][0]):
        resized = pixels.transpose(1, 2, 0)
        rows, cols = int(mask.any(1).sum()), int(mask.any(0).sum())
        assert resized.shape[:2] == (rows, cols) and resized.dtype == np.uint8 and values.dtype == np.float32
        grids.append({
            "width": cols,
            "height": rows,
            "resized": digest(resized),
            "patches": digest(patches(resized)),
            "pixel_values": digest(patches(values[:, :rows, :cols].transpose(1, 2, 0))),
        })
    return {"width": width, "height": height, "split": split, "longest_edge": longest, "shortest_edge": shortest, "grids": grids}


def resize_cases():
    sizes = [(1, 1), (2, 2), (1, 3000), (3000, 1), (3, 5), (377, 981), (378, 378), (379, 377), (100, 100), (640, 480), (980, 980), (981, 980)]
    sizes += [(979, 981), (1961, 13), (13, 1961), (1000, 500), (1959, 1961), (2048, 1365), (1234, 3), (4001, 29)]
    cases = [resize_case(width, height) for width, height in sizes]
    cases += [resize_case(width, height, split=True) for width, height in [(980, 980), (1, 1), (1, 33), (33, 1), (2, 3), (641, 479), (1961, 1313), (1960, 1960)]]
    for longest, shortest in [(168, 56), (448, 378), (200, 300), (980, 14), (15, 14)]:
        cases += [resize_case(width, height, longest=longest, shortest=shortest) for width, height in [(333, 211), (50, 400)]]
    return cases + [resize_case(333, 211, split=True, longest=168, shortest=56)]


def position_buckets(count, side):
    """The buckets of one axis, as the trained checkpoint and every transformers release but 4.55 to 4.57 have them."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    fractions = torch.arange(count, dtype=torch.float32) * (torch.tensor(1.0) / torch.tensor(float(count)))
    return torch.bucketize(fractions.clamp(max=1 - 1e-6), boundaries, right=True).tolist()


def normalizations():
    """Tables of an image processor over all 8-bit values, as f32 bits."""
    values = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 256, 1), 3, -1)
    out = []
    for factor, mean, std in [(1 / 255, [0.5] * 3, [0.5] * 3), (1 / 255, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]), (0.00392156862745098, [0.0] * 3, [1.0] * 3)]:
        processor = Idefics2ImageProcessor(do_resize=False, rescale_factor=factor, image_mean=mean, image_std=std)
        table = processor.preprocess([values], input_data_format="channels_last", return_tensors="np")["pixel_values"][0, 0, :, 0]
        out.append({"rescale_factor": factor, "mean": mean, "std": std, "table": digest(table)})
    return out


def main():
    FILES.mkdir(exist_ok=True)
    for old in FILES.iterdir():
        old.unlink()
    lossless = {}
    for name, (data, expected) in lossless_files().items():
        (FILES / name).write_bytes(data)
        rgb = reference_rgb(data) if expected is None else expected
        lossless[name] = {"width": rgb.shape[1], "height": rgb.shape[0], "rgb": digest(rgb)}
    lossy = {}
    for name, data in lossy_files().items():
        (FILES / name).write_bytes(data)
        rgb = reference_rgb(data)
        lossy[name] = {"width": rgb.shape[1], "height": rgb.shape[0], "rgb": rgb.tobytes().hex()}
    write = lambda name, value: (HERE / name).write_text(json.dumps(value, separators=(",", ":")).replace("},", "},\n") + "\n")
    write("decode.json", {"lossless": lossless, "lossy": lossy})
    write("resize.json", {"cases": resize_cases(), "normalizations": normalizations()})
    write("positions.json", {str(side): [position_buckets(count, side) for count in range(1, side + 1)] for side in (12, 70)})


if __name__ == "__main__":
    main()
