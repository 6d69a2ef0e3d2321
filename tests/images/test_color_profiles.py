"""Pictures with colour profiles: profiles are made here in bytes, and colours computed by formula.

The formats are those of ICC.1:2001-04 (version 2 profiles): matrix and curves, a curve of gray, and
a table (lut8) from CMYK to Lab.
"""

import io
import struct

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
from image_sources import convert, encode, flat, random_pixels, run, write_source

from images.color_profiles import ProfileError, to_srgb

# Red, green and blue as XYZ under D50, in columns: sRGB and Adobe RGB (1998), from Lindbloom.
SRGB = np.array([[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169],
                 [0.0139322, 0.0971045, 0.7141733]])
ADOBE = np.array([[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197],
                  [0.0194811, 0.0608902, 0.7448387]])
D50 = (0.9642, 1.0, 0.8249)
GAMMA = 563 / 256  # of Adobe RGB


def fixed(value):
    return struct.pack(">i", round(value * 65536))


def xyz(values):
    return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def icc(tags, space, kind=b"mntr", pcs=b"XYZ "):
    """Returns a profile of these tags."""
    start, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(data), len(tag))
        data += tag + b"\0" * (-len(tag) % 4)
    header = struct.pack(
        ">I4sI4s4s4s12s4s40s", start + len(data), b"\0\0\0\0", 0x02100000, kind, space, pcs,
        struct.pack(">6H", 2020, 1, 1, 0, 0, 0), b"acsp", b"") + b"".join(map(fixed, D50))
    header = header[:68] + b"".join(map(fixed, D50)) + bytes(48)  # the illuminant is at 68
    return header + struct.pack(">I", len(tags)) + table + data


def matrix_profile(matrix, gamma):
    channels = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, matrix.T), strict=True))
    return icc({b"wtpt": xyz(D50), **channels,
                **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma))}, b"RGB ")


def gray_profile(gamma):
    return icc({b"wtpt": xyz(D50), b"kTRC": curve(gamma)}, b"GRAY")


def ink_profile():
    """Ink makes paper darker, black alone: L* = 100 (1 - K), a* = b* = 0, whatever C, M and Y."""
    lightness = [255, 0] * 8  # of the corners, K changing fastest
    table = b"".join(bytes([light, 128, 128]) for light in lightness)
    identity = b"".join(map(fixed, np.eye(3).ravel()))
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + 4 * ramp + table + 3 * ramp
    return icc({b"wtpt": xyz(D50), b"A2B0": lut, b"A2B1": lut}, b"CMYK", b"prtr", b"Lab ")


def srgb_profile():
    return PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()


def srgb_levels(linear):
    """Returns what IEC 61966-2-1 makes of linear light: 12.92 x, or 1.055 x^(1/2.4) - 0.055."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear**(1 / 2.4) - 0.055)


def adobe_in_srgb(pixels):
    """Returns Adobe RGB [..., 3] in sRGB, by light, tristimulus values and light again."""
    light = (pixels / 255)**GAMMA
    return srgb_levels(light @ ADOBE.T @ np.linalg.inv(SRGB).T)


def converted(tmp_path, image, *args, profile=None, suffix="png", **kwargs):
    """Returns the pixels, and what the command prints."""
    name = f"x.{suffix}"
    path = write_source(tmp_path / "one", {
        name: encode(image, suffix, icc_profile=profile, **kwargs)})
    [(_, pixels)], _ = convert(path, tmp_path / "a.zip", *args)
    return pixels.astype(int), run(path, tmp_path / "a.zip", *args).output


NOTE = "Note: 1 image had a colour profile other than sRGB and was converted to sRGB, the first x"


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_colours_of_a_matrix_profile_are_those_of_the_formula(tmp_path, suffix):
    pixels = random_pixels(24, 24, 3)
    profile = matrix_profile(ADOBE, GAMMA)
    found, output = converted(tmp_path, pixels, profile=profile, suffix=suffix)
    expected = adobe_in_srgb(pixels)
    assert np.abs(found - expected).max() < 1.1  # half a level of rounding, and of its tables
    assert np.abs(expected - pixels).max() > 30  # far from what is in the file
    assert NOTE in output and "--icc=keep" in output


def test_white_black_and_gray_stay_neutral(tmp_path):
    pixels = np.array([0, 128, 255], np.uint8)[None, :, None].repeat(3, axis=2)
    found, _ = converted(tmp_path, pixels, profile=matrix_profile(ADOBE, GAMMA))
    assert np.ptp(found, axis=-1).max() <= 1
    assert found[0, 0].max() == 0 and found[0, 2].min() == 255


@pytest.mark.parametrize("gamma", [1.0, 1.8])
def test_gray_of_a_gray_profile_stays_gray(tmp_path, gamma):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found, output = converted(tmp_path, pixels, profile=gray_profile(gamma))
    assert found.shape == (16, 16) and NOTE in output
    assert np.abs(found - srgb_levels((pixels / 255)**gamma)).max() < 0.7


def test_gray_with_a_profile_of_colours_is_its_neutral_axis(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found, output = converted(tmp_path, pixels, profile=matrix_profile(ADOBE, 1.8))
    assert found.shape == (16, 16) and NOTE in output
    assert np.abs(found - srgb_levels((pixels / 255)**1.8)).max() < 0.7


def test_16_bits_of_gray_are_matched_after_their_upper_8_are_kept(tmp_path):
    pixels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    found, output = converted(tmp_path, PIL.Image.fromarray(pixels), profile=gray_profile(1.8))
    assert np.abs(found - srgb_levels((pixels // 257 / 255)**1.8)).max() < 0.7 and NOTE in output


def test_cmyk_with_a_profile_follows_it_without_a_warning(tmp_path):
    ink = np.zeros([1, 18, 4], np.uint8)
    ink[..., 3] = np.linspace(0, 255, 18).round()
    ink[..., :3] = random_pixels(1, 18, 3)  # which this profile makes nothing of
    found, output = converted(tmp_path, PIL.Image.fromarray(ink, "CMYK"), profile=ink_profile(),
                              suffix="tiff")
    lightness = 100 * (1 - ink[..., 3] / 255)  # CIE 1976: Y = ((L + 16) / 116)^3, L > 8
    light = np.where(lightness > 8, ((lightness + 16) / 116)**3, lightness / 903.3)
    assert np.abs(found - srgb_levels(light)[..., None]).max() < 2.5
    assert NOTE in output and "CMYK" not in output


@pytest.mark.parametrize("mode", ["RGBA", "P", "key", "LA"])
def test_transparency_and_palettes_are_kept_while_colours_are_matched(tmp_path, mode):
    profile = gray_profile(1.8) if mode == "LA" else matrix_profile(ADOBE, GAMMA)
    color, kwargs = (200, 100, 60), {}
    if mode == "P":
        image = PIL.Image.new("P", (4, 4), 1)
        image.putpalette([0, 0, 0, *color])
    elif mode == "LA":
        image = PIL.Image.new("LA", (4, 4), (100, 255))
    else:
        image = PIL.Image.new("RGBA" if mode == "RGBA" else "RGB", (4, 4), color)
    if mode in ("RGBA", "LA"):
        image.putpixel((0, 0), (*image.getpixel((0, 0))[:-1], 0))
    elif mode == "key":
        image.putpixel((0, 0), (1, 2, 3))
        kwargs = {"transparency": (1, 2, 3)}
    found, output = converted(tmp_path, image, profile=profile, **kwargs)
    expected = srgb_levels((100 / 255)**1.8) if mode == "LA" else adobe_in_srgb(np.array(color))
    assert np.abs(found[1, 1] - expected).max() < 1.1 and NOTE in output
    if mode != "P":
        assert (found[0, 0] == 255).all()  # the background is in sRGB already


@pytest.mark.parametrize("profile", [srgb_profile(), None])
@pytest.mark.parametrize("shape", [(9, 9, 3), (9, 9)])
def test_pictures_in_srgb_keep_every_pixel(tmp_path, profile, shape):
    pixels = random_pixels(*shape)
    found, output = converted(tmp_path, pixels, profile=profile)
    assert np.array_equal(found, pixels) and "colour profile" not in output


def test_a_profile_that_is_srgb_in_other_numbers_keeps_every_pixel():
    """A table of 1024 values instead of the formula, as in the profile of 1999 that most have."""
    levels = np.arange(1024) / 1023
    light = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055)**2.4)
    table = b"curv\0\0\0\0" + struct.pack(">I", 1024) + (light * 65535).round().astype(
        ">u2").tobytes()
    channels = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, SRGB.T), strict=True))
    profile = icc({b"wtpt": xyz(D50), **channels,
                   **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), table)}, b"RGB ")
    image = PIL.Image.fromarray(random_pixels(9, 9, 3))
    assert to_srgb(image, profile) is image
    assert to_srgb(image, matrix_profile(SRGB, 2.2)) is not image  # 7 levels off near black


def test_pixels_are_kept_if_asked(tmp_path):
    pixels = random_pixels(9, 9, 3)
    found, output = converted(tmp_path, pixels, "--icc=keep", profile=matrix_profile(ADOBE, GAMMA))
    assert np.array_equal(found, pixels) and "colour profile" not in output


@pytest.mark.parametrize("profile, reason", [
    (b"no profile", "cannot open profile"), (matrix_profile(ADOBE, 2.2)[:200], "cannot open"),
    (gray_profile(2.2), "is for GRAY, not for RGB"), (ink_profile(), "is for CMYK, not for RGB"),
    (icc({b"wtpt": xyz(D50)}, b"RGB "), "cannot build transform"),
])
def test_a_damaged_profile_is_a_warning_and_pixels_are_taken_as_they_are(tmp_path, profile, reason):
    pixels = random_pixels(9, 9, 3)
    found, output = converted(tmp_path, pixels, profile=profile)
    assert np.array_equal(found, pixels)
    [line] = [line for line in output.splitlines() if "colour profile" in line]
    assert line.startswith("Warning: 1 image has a colour profile that can't be used, so "
                           f"pixels are kept unchanged, the first x.png ({reason}")


def test_pillow_without_littlecms_is_a_warning(tmp_path, monkeypatch):
    def absent(*args):
        raise ImportError("no _imagingcms")

    monkeypatch.setattr(PIL.ImageCms, "ImageCmsProfile", absent)
    with pytest.raises(ProfileError, match="without LittleCMS"):
        to_srgb(PIL.Image.new("RGB", (4, 4)), matrix_profile(ADOBE, 2.5))


def test_condition_images_are_matched_and_counted_too(tmp_path):
    write_source(tmp_path / "src", {"x.png": flat(0)})
    write_source(tmp_path / "cond", {
        "x.png": encode(flat(100), icc_profile=gray_profile(1.0))})
    output = run(tmp_path / "src", tmp_path / "a.zip", f"--cond-source={tmp_path}/cond").output
    assert output.count("had a colour profile other than sRGB") == 1


def test_each_picture_goes_by_its_own_profile(tmp_path):
    images = {f"{i}.png": encode(flat(100), icc_profile=profile) for i, profile in enumerate(
        [gray_profile(1.0), None, gray_profile(1.8), b"damaged", gray_profile(1.0)])}
    path = write_source(tmp_path / "src", images)
    for workers in ("1", "2"):
        result = run(path, tmp_path / "a.zip", f"--workers={workers}")
        assert "Note: 3 images had" in result.output and "1 image has" in result.output
        found = [int(pixels.flat[0]) for _, pixels in convert(path, tmp_path / "a.zip")[0]]
        expected = [srgb_levels(100 / 255), 100, srgb_levels((100 / 255)**1.8), 100,
                    srgb_levels(100 / 255)]
        assert np.abs(np.subtract(found, expected)).max() < 0.7


def test_values_that_are_kept_know_no_profile(tmp_path):
    values = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    data = io.BytesIO()
    PIL.Image.fromarray(values).save(data, "png", icc_profile=gray_profile(1.0))
    path = write_source(tmp_path / "src", {"x.png": data.getvalue()})
    result = run(path, tmp_path / "out.zip", "--scale=minmax")
    assert result.exit_code == 0 and "colour profile" not in result.output
