"""Training corpora made from public sources: Debian packages and git repositories. Needs the extra ``pretrain``.

Data flows one way: ``lists -> packages, repositories (by git) -> containers -> members -> convert -> build``, and
``kinds``, ``licences -> manifest``.
"""

from benchmarks.corpus.build import Progress, build_debian, build_repositories
from benchmarks.corpus.errors import CorpusError
from benchmarks.corpus.kinds import KINDS, SoundKind, kind_of
from benchmarks.corpus.manifest import CorpusSummary
from benchmarks.corpus.packages import read_package_list
from benchmarks.corpus.repositories import Part, Repository, read_repository_list

__all__ = [
    "KINDS",
    "CorpusError",
    "CorpusSummary",
    "Part",
    "Progress",
    "Repository",
    "SoundKind",
    "build_debian",
    "build_repositories",
    "kind_of",
    "read_package_list",
    "read_repository_list",
]
