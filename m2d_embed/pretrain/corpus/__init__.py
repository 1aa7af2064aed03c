"""Training corpora made from public sources: Debian packages and git repositories. Needs the extra ``pretrain``.

Data flows one way: ``lists -> packages, repositories (by git) -> containers -> members -> convert -> build``, and
``kinds``, ``licences -> manifest``.
"""

from m2d_embed.pretrain.corpus.build import Progress, build_debian, build_repositories
from m2d_embed.pretrain.corpus.errors import CorpusError
from m2d_embed.pretrain.corpus.kinds import KINDS, Kind, kind_of
from m2d_embed.pretrain.corpus.manifest import CorpusSummary
from m2d_embed.pretrain.corpus.packages import read_package_list
from m2d_embed.pretrain.corpus.repositories import Part, Repository, read_repository_list

__all__ = [
    "KINDS",
    "CorpusError",
    "CorpusSummary",
    "Kind",
    "Part",
    "Progress",
    "Repository",
    "build_debian",
    "build_repositories",
    "kind_of",
    "read_package_list",
    "read_repository_list",
]
