"""What is cut out of a picture: its bounds, its middle, its colours. Pixels of the test picture tell where they lie."""

import functools
import io
import struct

import numpy as np
import pytest
from PIL import Image

from jvitmoe.data.pictures import (
    AREA,
    LONGEST,
    ORIENTATION,
    PADDING,
    RATIO,
    DataError,
    Picture,
    centre_crop,
    exact,
    opened,
    pixels,
    random_crop,
    whole,
)

square = functools.partial(centre_crop, crop="exact")

HEIGHT, WIDTH = 160, 240


@pytest.fixture(scope="module")
def ramp():
    """A picture whose red grows by one per column and whose green grows by one per row."""
    y_HW, x_HW = np.mgrid[:HEIGHT, :WIDTH]
    return Picture("ramp", np.stack([x_HW, y_HW, 0 * x_HW], -1).astype(np.uint8))


def cut_from(pixels):
    """Returns (left, top, width, height) that a resized part of the ramp was cut from."""
    side = len(pixels)
    across, down = pixels[side // 2, :, 0].astype(float), pixels[:, side // 2, 1].astype(float)
    found = []
    for line in (across, down):
        slope = (line[-3] - line[2]) / (side - 5)  # away from the edges, where the filter sees one side only
        found.append((line[2] - 2.5 * slope + 0.5, slope * side))
    return found[0][0], found[1][0], found[0][1], found[1][1]


def test_random_parts_lie_inside_and_obey_the_bounds_on_area_and_ratio(ramp):
    parts = [cut_from(random_crop(ramp, 24, 3, seed)) for seed in range(300)]
    left, top, width, height = np.array(parts).T
    assert (left > -2).all() and (top > -2).all()  # noqa: PT018
    assert (left + width < WIDTH + 2).all()
    assert (top + height < HEIGHT + 2).all()
    share, ratio = width * height / (WIDTH * HEIGHT), width / height
    assert AREA - 0.02 < share.min() < 0.13
    assert 0.85 < share.max() < 1.03
    assert RATIO[0] - 0.05 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < RATIO[1] + 0.06
    assert abs(np.log(ratio).mean()) < 0.05  # as often wide as high
    assert np.ptp(left) > WIDTH / 3
    assert np.ptp(top) > HEIGHT / 3


def photograph(**options) -> bytes:
    """Returns a JPEG of 300x400 smooth random pixels."""
    coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def test_a_large_jpeg_is_decoded_at_a_smaller_scale_to_almost_the_same_pixels():
    """Within 8 levels, and 1 on average; to the bit if the crop needs the whole scale."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for content in (photograph(), photograph(exif=exif)):
        with opened(Picture("photograph", content)) as image:
            whole = Picture("whole", np.asarray(pixels(image, 3, "photograph")))
        apart = []
        for seed in range(40):
            small, exact_ = (random_crop(p, 24, 3, seed).astype(int) for p in (Picture("small", content), whole))
            apart.append(np.abs(small - exact_))
            crops = (random_crop(p, 200, 3, seed) for p in (Picture("small", content), whole))
            np.testing.assert_array_equal(*crops)
        assert max(difference.max() for difference in apart) <= 8
        assert 0 < np.mean(apart) < 1


def test_a_picture_whose_pixels_can_be_read_is_read_whatever_its_exif_says():
    """Turned where the orientation is a number of EXIF, else as it is; by all ways of reading alike."""

    def exif(*entries: tuple[int, int, bytes]) -> bytes:  # (tag, type, value) of one value each
        body = b"".join(struct.pack("<HHI4s", tag, kind, 1, value) for tag, kind, value in entries)
        return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)

    sideways, odd = (ORIENTATION, 3, b"\6\0\0\0"), (0x128, 1, b"\2\0\0\0")  # ResolutionUnit must be a short
    text = (ORIENTATION, 2, b"6\0\0\0")
    smooth = np.add.outer(np.arange(64), 3 * np.arange(48)).astype(np.uint8)
    contents = {"sound": (exif(sideways), True), "odd": (exif(sideways, odd), True), "text": (exif(text), False)}
    contents |= {"none": (exif((ORIENTATION, 3, bytes([9, 0, 0, 0]))), False), "rubbish": (b"rubbish", False)}
    for kind in ("JPEG", "PNG", "WEBP"):
        plain = io.BytesIO()
        Image.fromarray(smooth).convert("RGB").save(plain, kind)
        with opened(Picture("plain", plain.getvalue())) as image:
            upright = np.asarray(image.convert("L"))
        for name, (content, turned) in contents.items():
            file, seen = io.BytesIO(), np.rot90(upright, -1) if turned else upright
            Image.fromarray(smooth).convert("RGB").save(file, kind, exif=b"Exif\0\0" + content)
            picture, whole = Picture(f"{kind} {name}", file.getvalue()), Picture(name, seen[..., None])
            np.testing.assert_array_equal(exact(picture, (*seen.shape, 1), ""), seen[..., None], picture.name)
            np.testing.assert_array_equal(square(picture, 48, 1), square(whole, 48, 1), picture.name)
            np.testing.assert_array_equal(random_crop(picture, 24, 1, 0), random_crop(whole, 24, 1, 0), picture.name)


def test_a_turned_tiff_is_read_as_it_is_seen_from_its_file_and_cropped_inside(tmp_path):
    """Pillow swaps the size of a turned TIFF already when it opens it, and maps an uncompressed one wrongly."""
    grey = np.add.outer(np.arange(64), 3 * np.arange(48)).astype(np.uint8)
    image = Image.fromarray(grey)
    exif = image.getexif()
    exif[ORIENTATION] = 6
    image.save(tmp_path / "turned.tif", exif=exif)
    seen = np.rot90(grey, -1)
    turned, upright = Picture("turned", tmp_path / "turned.tif"), Picture("upright", seen[..., None])
    np.testing.assert_array_equal(exact(turned, (48, 64, 1), "")[..., 0], seen)
    for seed in range(20):
        np.testing.assert_array_equal(random_crop(turned, 8, 1, seed), random_crop(upright, 8, 1, seed))


def test_a_strip_that_no_part_fits_in_gives_its_middle():
    strip = Picture("strip", np.tile(np.arange(250, dtype=np.uint8)[None, :, None], (2, 1, 3)))
    pixels = random_crop(strip, 8, 3, 0)
    assert pixels.shape == (8, 8, 3)
    assert abs(pixels.mean() - 124.5) < 2


@pytest.mark.parametrize(("cut", "side"), [(centre_crop, 140), (square, 160)])
def test_the_centre_crop_is_the_middle_of_seven_eighths_or_all_of_the_shorter_side(ramp, cut, side):
    left, top, width, height = cut_from(cut(ramp, 70, 3))
    np.testing.assert_allclose([width, height], side, atol=3)
    np.testing.assert_allclose([left, top], [(WIDTH - side) / 2, (HEIGHT - side) / 2], atol=2)


@pytest.mark.parametrize("size", [(30, 60), (61, 30), (7, 7), (1, 500)])
def test_a_whole_picture_is_all_there_and_padded_with_grey_in_the_middle(size):
    for channels in (1, 3, 4):
        white = Picture("white", np.full((*size, channels), 255, np.uint8))
        seen = whole(white, 32, channels)
        assert seen.shape == (32, 32, channels)
        rows, columns = ((seen[..., 0] != PADDING).any(axis).sum() for axis in (1, 0))
        assert (rows, columns) == tuple(max(1, round(32 * length / max(size))) for length in size)
        assert {*np.unique(seen)} <= {PADDING, 255}
        if (32 - rows) % 2 == (32 - columns) % 2 == 0:
            np.testing.assert_array_equal(seen, seen[::-1, ::-1])


@pytest.mark.parametrize("area", [0.35, 1.0])
def test_a_random_part_has_at_least_the_area_that_is_asked_for(ramp, area):
    for seed in range(40):
        _, _, width, height = cut_from(random_crop(ramp, 24, 3, seed, area))
        # At 1 hardly a draw fits in, and the largest part of an allowed ratio is taken.
        assert width * height / (WIDTH * HEIGHT) > min(area, RATIO[1] * HEIGHT / WIDTH) - 0.04


def test_a_strip_that_resizing_would_enlarge_beyond_any_photograph_is_refused():
    strip = Picture("strip", np.zeros((1, 10_000, 3), np.uint8))
    assert square(strip, 8, 3).shape == (8, 8, 3)
    for cut in (square, centre_crop):
        with pytest.raises(DataError, match=r"strip cannot be read.*10000x1 pixels"):
            cut(strip, 224, 3)


def test_what_is_no_picture_is_an_error_that_names_it(ramp):
    for cut in (lambda p: centre_crop(p, 8, 3), lambda p: random_crop(p, 8, 3, 0)):
        with pytest.raises(DataError, match="seven cannot be read as an image"):
            cut(Picture("seven", b"no picture"))
    with pytest.raises(DataError, match="ramp is 160x240 pixels but all are square"):
        exact(ramp, (8, 8, 3), "all are square")
    np.testing.assert_array_equal(exact(ramp, (HEIGHT, WIDTH, 3), ""), ramp.encoded)


GREY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
HALF = np.where(np.arange(8) < 4, 255, 0).astype(np.uint8) * np.ones((8, 1), np.uint8)  # opaque on the left alone
ON_WHITE = np.where(HALF, GREY, 255)


def as_file(image: Image.Image, kind: str = "PNG", **options: object) -> Picture:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Picture("picture", file.getvalue())


def turned(kind: str) -> Picture:
    """A picture that a camera held on its side has taken: to be turned by 90 degrees clockwise."""
    image = Image.fromarray(GREY).transpose(Image.Transpose.ROTATE_90)
    exif = image.getexif()
    exif[ORIENTATION] = 6
    return as_file(image, kind, exif=exif)


def colours() -> Image.Image:
    return Image.fromarray(np.dstack([GREY, GREY.T, 255 - GREY]))


DIGITS_OF_16_BITS = " ".join(str(257 * int(x)) for x in GREY.flat)

FILES = {  # (file, what every one of its channels shows)
    "grey": (as_file(Image.fromarray(GREY)), GREY),
    "16 bits": (as_file(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY),
    "16 dark bits": (as_file(Image.fromarray(GREY.astype(np.uint16))), GREY * 0),
    "16 bits, big-endian": (as_file(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF", big_endian=True), GREY),
    "16 bits, PGM": (as_file(Image.fromarray(GREY.astype(np.int32) * 257), "PPM"), GREY),
    "16 bits, PGM of text": (Picture("", f"P2 8 8 65535 {DIGITS_OF_16_BITS}".encode()), GREY),
    "palette": (as_file(Image.fromarray(GREY).convert("P")), GREY),
    "two colours": (as_file(Image.fromarray(HALF).convert("1")), HALF),
    "grey and alpha": (as_file(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(HALF)])), ON_WHITE),
    "colours and alpha": (as_file(Image.fromarray(np.dstack([GREY, GREY, GREY, HALF]))), ON_WHITE),
    "a palette with a clear colour": (
        as_file(Image.fromarray(GREY).convert("P"), transparency=bytes([0, *[255] * 255])),
        np.where(GREY, GREY, 255),
    ),
    "a colour that is clear": (as_file(Image.fromarray(GREY), transparency=0), np.where(GREY, GREY, 255)),
    "ink": (as_file(Image.fromarray(np.dstack([GREY * 0] * 3 + [255 - GREY]), "CMYK"), "TIFF"), GREY),
    "a turned PNG": (turned("PNG"), GREY),
    "a turned TIFF": (turned("TIFF"), GREY),
}


@pytest.mark.parametrize("name", FILES)
def test_whatever_the_file_holds_all_ways_to_read_it_see_the_same_grey(name):
    file, wanted = FILES[name]
    for channels in (1, 3):
        found = exact(file, (8, 8, channels), "")
        np.testing.assert_array_equal(found, np.repeat(wanted[..., None], channels, 2))
        np.testing.assert_array_equal(square(file, 8, channels), found)
    again = Picture("again", found)  # the same pixels, in memory
    np.testing.assert_array_equal(centre_crop(file, 5, 3), centre_crop(again, 5, 3))
    draws = (random_crop(p, 5, 3, 0) for p in (file, again))
    np.testing.assert_array_equal(*draws)


def test_a_model_that_sees_transparency_gets_it_and_colours_stay():
    alpha = np.dstack([np.asarray(colours()), HALF])
    np.testing.assert_array_equal(exact(as_file(Image.fromarray(alpha)), (8, 8, 4), ""), alpha)
    np.testing.assert_array_equal(exact(as_file(colours()), (8, 8, 3), ""), colours())
    assert (exact(as_file(colours()), (8, 8, 4), "")[..., 3] == 255).all()


def test_a_picture_that_is_turned_has_the_size_that_is_seen():
    image = Image.new("L", (6, 4))
    exif = image.getexif()
    exif[ORIENTATION] = 8
    assert exact(as_file(image, exif=exif), (6, 4, 1), "").shape == (6, 4, 1)
    with pytest.raises(DataError, match="picture is 6x4 pixels but wide is wanted"):
        exact(as_file(image, exif=exif), (4, 6, 1), "wide is wanted")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_other_kinds_are_refused(mode):
    with pytest.raises(DataError, match=f"picture has pixels of mode {mode}"):
        square(as_file(Image.new(mode, (8, 8)), "TIFF"), 8, 1)


@pytest.mark.parametrize("size", [(1, LONGEST + 1), (LONGEST + 1, 1)])
def test_a_side_that_no_camera_has_is_refused_from_the_header_alone(size):
    file = io.BytesIO()
    Image.new("L", size).save(file, "PPM")
    picture = Picture("long.pgm", file.getvalue()[:40])  # without most of its pixels
    for read in (lambda: square(picture, 8, 1), lambda: exact(picture, (1, 8, 1), "all are 8x8")):
        with pytest.raises(DataError, match=rf"long.pgm .*{size[0]}x{size[1]} pixels"):
            read()
