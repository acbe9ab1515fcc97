"The vision transformer against what its lessons are too short for: every pooling, stem and patch size, kept patches, features, attention, masks."
import dataclasses

import pytest
import torch
from fastcore.test import test_close as close, test_eq as equal

from mmsn.encoders.vit import Attention, Block, ViT
from mmsn.options import ImageEncoder, InputError

SMALL = ImageEncoder(dim=96, depth=2, heads=3)


def model(size=64, **changes): return ViT(dataclasses.replace(SMALL, **changes), size).eval()


@pytest.mark.parametrize('pool', ['cls', 'mean'])
def test_kept_patches(pool):
    "Each image by its own mask, or all by one: the blocks run by hand on the kept tokens give the same."
    torch.manual_seed(0)
    x = torch.rand(4, 1, 64, 64)
    keep = torch.rand(4, 16).argsort(1)[:, :12].sort(1).values
    m = model(pool=pool)
    all_tokens = m.embed(x)
    patches = all_tokens[:, -16:]
    cut = torch.stack([patches[i, keep[i]] for i in range(4)])
    if pool == 'cls': cut = torch.cat([all_tokens[:, :1], cut], 1)
    for block in m.blocks: cut = block(cut)
    by_hand = m.norm(cut)[:, 0] if pool == 'cls' else m.norm(cut).mean(1)
    close(m(x, keep), by_hand, 1e-6)
    equal(m.tokens(x, keep).shape[1], 12 + (pool == 'cls'))
    close(m(x, torch.arange(16).expand(4, 16)), m(x), 1e-6)
    close(m(x, keep), m(x, keep.flip(1)), 1e-5)
    assert (m(x, keep) - m(x)).abs().max() > 1e-4
    close(m(x, keep)[2:3], m(x[2:3], keep[2:3]), 1e-5)
    shared = keep[:1].expand(4, -1)
    close(m(x, shared)[1:2], m(x[1:2], keep[:1]), 1e-5)
    assert (m(x, keep) - m(x, shared))[1:].abs().amax(1).min() > 1e-4


@pytest.mark.parametrize('pool', ['cls', 'mean'])
def test_features_and_attention(pool):
    "The last block is `forward`; the middle block's attention, from its values back to its output."
    torch.manual_seed(0)
    x, keep = torch.randn(3, 1, 64, 64), torch.rand(3, 16).argsort(1)[:, :10]
    m, n_cls = model(depth=3, pool=pool), int(pool == 'cls')
    equal(m.features(x, 3).shape, (3, 288))
    for k in (None, keep): close(m.features(x, 2, k)[:, 96:], m(x, k), 1e-5)
    first = m.norm(m.blocks[0](m.embed(x)))
    close(m.features(x, 3)[:, :96], first[:, 0] if n_cls else first.mean(1), 1e-5)
    maps = m.attention(x, keep=keep)
    equal(maps.shape, (3, 3, 10 + n_cls, 10 + n_cls)); close(maps.sum(-1), torch.ones(3, 3, 10 + n_cls), 1e-5)
    for block in range(3): assert torch.equal(m.attention(x, block), m.attention(x, block - 3))
    z, attn = m.blocks[1].norm1(m.blocks[0](m.embed(x))), m.blocks[1].attn
    close(attn.proj((m.attention(x, 1)@attn._heads(z)[2]).transpose(1, 2).reshape(z.shape)), attn(z), 1e-5)
    with pytest.raises(InputError, match='3 blocks'): m.features(x, 4)
    with pytest.raises(InputError, match='none with number 3'): m.attention(x, 3)


@pytest.mark.parametrize('side, views', [(4, (224, 96)), (7, (224, 98)), (8, (224, 96)), (16, (224, 96)), (14, (224, 98)), (5, (60, 20))])
def test_patch_sizes(side, views):
    with torch.device('meta'):
        m = ViT(ImageEncoder(patch=side), views[0])
        for size in views: equal(m.tokens(torch.empty(2, 1, size, size)).shape, (2, 1 + (size//side)**2, 384))


def test_views_of_no_whole_patches():
    with pytest.raises(InputError, match='96x96 pixels is not made of whole patches of 7'): model(224, patch=7)(torch.rand(1, 1, 96, 96))


@pytest.mark.parametrize('stem', ['linear', 'conv'])
def test_a_grey_image_equals_three_equal_channels(stem):
    torch.manual_seed(0)
    m, grey, colour = model(channels=3, stem=stem), torch.randn(2, 1, 64, 64), torch.randn(2, 3, 64, 64)
    for keep in (None, torch.tensor([[0, 3, 9], [1, 2, 15]])): close(m(grey, keep), m(grey.repeat(1, 3, 1, 1), keep), 1e-5)
    assert (m(colour) - m(colour[:, :1])).abs().max() > .01


def test_masks_and_order():
    "A masked token changes nothing for the others, and a block has no order of its own."
    torch.manual_seed(0)
    attn, x = Attention(12, 3), torch.randn(2, 5, 12)
    v = attn.qkv(x).chunk(3, -1)[2].view(2, 5, 3, 4).transpose(1, 2)
    close(attn.proj((attn.weights(x)@v).transpose(1, 2).reshape(2, 5, 12)), attn(x), 1e-6)
    with pytest.raises(InputError, match='do not divide'): Attention(12, 5)
    block, mask = Block(12, 3), torch.tensor([1, 1, 1, 1, 0]).bool().view(1, 1, 1, 5)
    other = x.clone()
    other[:, 4] = 99.
    close(block(x, mask)[:, :4], block(other, mask)[:, :4], 1e-6)
    close(block(x, mask)[:, :4], block(x[:, :4]), 1e-5)
    order = torch.tensor([3, 0, 4, 1, 2])
    close(block(x)[:, order], block(x[:, order]), 1e-5)


@pytest.mark.parametrize('pool', ['cls', 'mean'])
@pytest.mark.parametrize('channels', [1, 3])
def test_mask_stem(pool, channels):
    "Visible tokens neither see hidden pixels nor what a stem makes of hidden places; without hidden patches nothing changes."
    torch.manual_seed(0)
    m = model(stem='conv', mask_stem=True, pool=pool, channels=channels)
    for conv in m.patch_embed.convs: torch.nn.init.normal_(conv.bias)
    keep = torch.rand(3, 16).argsort(1)[:, :7]
    hidden = torch.ones(3, 16).scatter(1, keep, 0.).view(3, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3).bool()
    x = torch.randn(3, 1, 64, 64, requires_grad=True)
    m.tokens(x, keep).square().sum().backward()
    assert (x.grad[hidden] == 0).all() and (x.grad[~hidden] != 0).float().mean() > .9
    with torch.no_grad():
        other = torch.where(hidden, torch.randn_like(x)*50, x)
        assert torch.equal(m(other, keep), m(x, keep)) and torch.equal(m.features(other, 2, keep), m.features(x, 2, keep))
        features = []
        hooks = [conv.register_forward_hook(lambda _, a, out: features.append(a[0])) for conv in [*m.patch_embed.convs, m.patch_embed.proj]]
        m(x, keep)
        for hook in hooks: hook.remove()
        for f in features:   # what enters each convolution is 0 outside the visible patches, and not 0 inside
            at = hidden[:, :, ::64//f.shape[-1], ::64//f.shape[-1]].expand_as(f)
            assert f[at].abs().max() == 0 < f[~at].abs().max()
        plain = model(stem='conv', pool=pool, channels=channels)
        plain.load_state_dict(m.state_dict())
        assert torch.equal(m(x), plain(x)) and not torch.equal(m(x, keep), plain(x, keep))


@pytest.mark.parametrize('stem', ['linear', 'conv', 'masked'])
@pytest.mark.parametrize('pool', ['cls', 'mean'])
def test_keep_as_a_mask(pool, stem):
    "A mask over all patches says what numbers say, in every method, and lets images hide different counts."
    torch.manual_seed(0)
    m = model(stem='linear' if stem == 'linear' else 'conv', mask_stem=stem == 'masked', pool=pool, depth=3)
    x, counts, n_cls = torch.randn(4, 1, 64, 64), (1, 5, 11, 16), int(pool == 'cls')
    order = torch.rand(4, 16).argsort(1)
    mask = torch.zeros(4, 16).scatter(1, order, (torch.arange(16) < torch.tensor(counts)[:, None]).float()).bool()
    for i, n in enumerate(counts):
        one, keep = x[i:i+1], mask[i:i+1].nonzero()[None, :, 1]
        close(m(x, mask)[i:i+1], m(one, keep), 1e-5)
        close(m.features(x, 2, mask)[i:i+1], m.features(one, 2, keep), 1e-5)
        seen = torch.cat([torch.ones(n_cls).bool(), mask[i]])
        close(m.tokens(x, mask)[i, seen], m.tokens(one, keep)[0], 1e-5)
        maps = m.attention(x, 1, mask)[i]
        close(maps[:, seen][..., seen], m.attention(one, 1, keep)[0], 1e-5)
        assert (maps[..., ~seen] == 0).all()
    pixels = x.clone().requires_grad_()
    m(pixels, mask).square().sum().backward()
    hidden = ~mask.view(4, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert (pixels.grad[hidden] == 0).all() and all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())
    assert torch.equal(m(torch.where(hidden, 9., x), mask), m(x, mask))
