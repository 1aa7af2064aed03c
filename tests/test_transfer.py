"""To the device and back."""

import pytest
import torch

from m2d_embed.runtime.transfer import CudaLink, PlainLink, link_to


def test_the_cpu_copies_nothing():
    link = link_to(torch.device("cpu"))
    assert isinstance(link, PlainLink)
    host = link.host_buffer((3,), torch.float32)
    assert link.upload(host).data_ptr() == host.data_ptr()
    assert link.download(host)().data_ptr() == host.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_many_copies_through_pinned_memory():
    """Buffers are let go of while copies from them are under way: none may be given away too early."""
    link = link_to(torch.device("cuda"))
    assert isinstance(link, CudaLink)
    under_way = []
    for i in range(200):
        host = link.host_buffer((1 << 18,), torch.float32)
        assert host.is_pinned()
        host.fill_(i)
        tensor = link.upload(host)
        del host
        under_way.append(link.download(tensor * 2))
    for i, fetch in enumerate(under_way):
        assert (fetch() == 2 * i).all()
