"""Training corpora made from public sources; so far from the audio in Debian packages. Needs the extra ``pretrain``.

Data flows one way: ``packages -> containers -> members -> convert -> build``, and ``kinds``, ``licences -> manifest``.
"""

from m2d_embed.pretrain.corpus.build import Progress, build_debian
from m2d_embed.pretrain.corpus.errors import CorpusError
from m2d_embed.pretrain.corpus.kinds import KINDS, Kind, kind_of
from m2d_embed.pretrain.corpus.manifest import CorpusSummary
from m2d_embed.pretrain.corpus.packages import read_package_list

__all__ = ["KINDS", "CorpusError", "CorpusSummary", "Kind", "Progress", "build_debian", "kind_of", "read_package_list"]
