"""The models known by name: the bundled one and NTT's official releases. Nothing else; there are no invented names.

Usage::

    import m2d_embed

    m2d_embed.registry.RELEASES["m2d_vit_base-80x608p16x16-221006-mr7"].sample_rate  # 16000
    model = m2d_embed.load_model("m2d_vit_base-80x608p16x16-221006-mr7")  # downloads it once
"""

from __future__ import annotations

from dataclasses import dataclass

from m2d_embed.config import CheckpointName

BUNDLED_NAME = "m2d_vit_tiny-80x304p16x16"

RELEASE_URL = "https://github.com/nttcslab/m2d/releases/download"

LICENSE_NOTICE = (
    "These weights are NTT's, not part of m2d-embed. They come under NTT's own evaluation licence, which allows "
    "research and evaluation but no commercial use, and must not be redistributed: read "
    "https://github.com/nttcslab/m2d/blob/master/LICENSE.pdf before you use them."
)


@dataclass(frozen=True)
class Release:
    """An official M2D release: a zip attached to a GitHub release of nttcslab/m2d."""

    name: str
    tag: str

    @property
    def shape(self) -> CheckpointName:
        """Family, size, input and patch size, as its name states them."""
        return CheckpointName.parse(self.name)

    @property
    def sample_rate(self) -> int:
        """Sample rate in Hz."""
        return self.shape.sample_rate

    def url(self, base: str = RELEASE_URL) -> str:
        """Where the zip is."""
        return f"{base.rstrip('/')}/{self.tag}/{self.name}.zip"


RELEASES = {
    name: Release(name, tag)
    for tag, names in {
        "v0.1.0": (
            "m2d_vit_base-80x608p16x16-221006-mr7",
            "m2d_vit_base-80x608p16x16-221006-mr7_enconly",
            "m2d_vit_base-80x608p16x16-221006-mr6",
            "m2d_vit_base-80x608p16x16-220930-mr7_enconly",
            "m2d_vit_base-80x200p16x4-230529",
            "m2d_as_vit_base-80x608p16x16-240213",
            "m2d_as_vit_base-80x608p16x16p32k-240413_enconly",
            "m2d_clap_vit_base-80x608p16x16-240128",
        ),
        "v0.2.0": (
            "m2d_s_vit_base-80x400p80x2-230201",
            "m2d_s_vit_base-80x512p80x2-230301",
            "m2d_s_vit_base-80x608p80x2-230220",
        ),
        "v0.3.0": (
            "m2d_vit_base-80x1001p16x16-221006-mr7_as_46ab246d",
            "m2d_as_vit_base-80x1001p16x16-240213_AS-FT_enconly",
            "m2d_as_vit_base-80x1001p16x16p32k-240413_AS-FT_enconly",
            "m2d_clap_vit_base-80x1001p16x16-240128_AS-FT_enconly",
        ),
    }.items()
    for name in names
}
