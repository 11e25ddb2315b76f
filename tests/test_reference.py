"""The references against the papers' formulas, written as loops over numpy arrays."""

import itertools

import numpy as np
import pytest
import torch

from sodfast import ops

float64 = torch.float64


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=float64) for shape in shapes]


def convolve(x, weight, dilation=1):
    """y[b,o,r,c] = Σ w[o,i,u,v] x[b,i,r+(u-1)d,c+(v-1)d], zero outside; 1x1 has one tap."""
    batch, _, height, width = x.shape
    reach = weight.shape[-1] // 2
    y = np.zeros((batch, weight.shape[0], height, width))
    for u, v in itertools.product(range(weight.shape[-1]), repeat=2):
        down, right = (u - reach) * dilation, (v - reach) * dilation
        for r, c in itertools.product(range(height), range(width)):
            if 0 <= r + down < height and 0 <= c + right < width:
                y[:, :, r, c] += x[:, :, r + down, c + right] @ weight[:, :, u, v].T
    return y


def pool(x, size, reduce):
    batch, channels, height, width = x.shape
    height, width = height // size, width // size
    x = x[:, :, : height * size, : width * size]
    return reduce(x.reshape(batch, channels, height, size, width, size), axis=(3, 5))


def upsample(x, factor):
    """Bilinear, pixel centres at (i + ½) / factor - ½, clamped at the border."""
    for axis in (2, 3):
        size = x.shape[axis]
        at = np.clip((np.arange(size * factor) + 0.5) / factor - 0.5, 0, size - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, size - 1)
        share = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return x


def goctconv_by_loops(xs, weight, out_channels, stride):
    if stride == 2:
        xs = [pool(x, 2, np.mean) for x in xs]
    rows, columns = np.cumsum([0, *out_channels]), np.cumsum([0, *[x.shape[1] for x in xs]])
    ys = []
    for j in range(len(out_channels)):
        y = np.zeros(())
        for i, x in enumerate(xs):
            kernel = weight[rows[j] : rows[j + 1], columns[i] : columns[i + 1]]
            if j > i:
                y = y + convolve(pool(x, 2 ** (j - i), np.max), kernel)
            else:
                y = y + upsample(convolve(x, kernel), 2 ** (i - j))
        ys.append(y)
    return ys


def epilogue(y, bias, slope):
    y = y + bias[:, None, None]
    return np.where(y > 0, y, slope[:, None, None] * y)


def assert_close(ys, expected):
    assert len(ys) == len(expected)
    for y, e in zip(ys, expected):
        assert y.shape == e.shape
        np.testing.assert_allclose(y.numpy(), e, rtol=1e-11, atol=1e-12)


def window_search(x, size, reduce):
    """The extreme of every size×size window, cut off at the border."""
    y, reach = np.empty_like(x), size // 2
    for r, c in itertools.product(range(x.shape[2]), range(x.shape[3])):
        rows = slice(max(0, r - reach), r + reach + 1)
        y[:, :, r, c] = reduce(x[:, :, rows, max(0, c - reach) : c + reach + 1], axis=(2, 3))
    return y


@pytest.mark.parametrize("k", [1, 3, 9])
def test_boundary_is_its_formula(k):
    (z,) = tensors((2, 2, 7, 12))
    x = z.numpy()
    low, high = (window_search(x, 3, reduce) for reduce in (np.min, np.max))
    for thin, t in (("inner", x - low), ("outer", high - x), ("both", high - low)):
        assert_close([ops.boundary_reference(z, k, thin)], [window_search(t, k, np.max)])


def test_structure_polishing_sums_are_their_formula():
    logits, truth = tensors((2, 1, 7, 12), (2, 1, 7, 12))
    maps = [1 / (1 + np.exp(-logits.numpy())), truth.numpy()]
    edges = [window_search(x - window_search(x, 3, np.min), 5, np.max) for x in maps]
    pixels = (1, 2, 3)
    rows = [[(p * g).sum(pixels), p.sum(pixels), g.sum(pixels)] for p, g in (maps, edges)]
    found = ops.structure_polishing_sums_reference(logits, truth, 5)
    assert_close([found], [np.array(rows).transpose(2, 0, 1)])


def test_dkd_is_its_formulas():
    *logits, truth, theta = tensors((3, 1, 5, 8), (3, 1, 5, 8), (3, 1, 5, 8), (3,))
    truth, theta = truth.sigmoid(), theta.sigmoid()
    g, weight = truth.numpy(), theta.numpy()[:, None, None, None]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x.numpy()))

    maps = [sigmoid(x) for x in logits]
    student, teacher = [(p * g).sum((1, 2, 3)) / (p + g - p * g).sum((1, 2, 3)) for p in maps]
    weight_of = np.tanh(teacher**0.6 * (1 - student) ** 0.4)
    expected = [np.where(teacher > 0.45, weight_of, 0.03), teacher, 1 - student]
    assert_close(ops.dkd_theta_reference(*logits, truth, 0.6, 0.45, 0.03), expected)
    q, p = (sigmoid(x / 3) for x in logits)
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    ce = -g * np.log(maps[0]) - (1 - g) * np.log(1 - maps[0])
    loss = (weight * 7 * kl + (1 - weight) * ce).mean((1, 2, 3))
    assert_close([ops.dkd_loss_reference(*logits, truth, theta, 3.0, 7.0)], [loss])


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_scfm_is_its_formula(factor):
    x, y = tensors((2, 3, 4 * factor, 5 * factor), (2, 3, 4, 5))
    up = upsample(y.numpy(), factor)
    assert_close([ops.scfm_reference(x, y)], [x.numpy() * (1 + up)])
    assert_close([ops.scfm_reference(x, y, multiply=False)], [x.numpy() + up])


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("channels", "out_channels"),
    [
        ((3,), (2,)),
        ((3,), (2, 1, 2)),
        ((3, 2), (1, 4)),
        ((3, 1, 2), (2,)),
        ((1, 2, 3, 2), (2,) * 4),
    ],
)
def test_goctconv(channels, out_channels, stride, kernel_size):
    shapes = [(2, c, 32 >> i, 16 >> i) for i, c in enumerate(channels)]
    *xs, weight, bias, slope = tensors(
        *shapes,
        (sum(out_channels), sum(channels), kernel_size, kernel_size),
        (sum(out_channels),),
        (sum(out_channels),),
    )
    plain = goctconv_by_loops([x.numpy() for x in xs], weight.numpy(), out_channels, stride)
    assert_close(ops.goctconv_reference(xs, weight, out_channels, stride), plain)
    parts = np.cumsum(out_channels)[:-1]
    biases, slopes = np.split(bias.numpy(), parts), np.split(slope.numpy(), parts)
    assert_close(
        ops.goctconv_reference(xs, weight, out_channels, stride, bias, slope),
        [epilogue(y, b, a) for y, b, a in zip(plain, biases, slopes)],
    )


def test_goctconv_on_an_odd_size_loses_a_row_and_a_column_to_the_stride():
    x, weight = tensors((1, 2, 7, 5), (3, 2, 3, 3))
    (y,) = ops.goctconv([x], weight, [3], stride=2)
    assert_close([y], goctconv_by_loops([x.numpy()], weight.numpy(), [3], 2))
    assert y.shape == (1, 3, 3, 2)


def test_goctconv_with_absent_scales(backend, device):
    x0, x1, weight, bias = (
        t.to(device) for t in tensors((2, 0, 8, 8), (2, 3, 4, 4), (4, 3, 1, 1), (4,))
    )
    ys = ops.goctconv([x0, x1], weight, [2, 0, 2], bias=bias)
    assert [y.shape for y in ys] == [(2, 2, 8, 8), (2, 0, 4, 4), (2, 2, 2, 2)]
    only = ops.goctconv_reference([x0[:, :0], x1], weight, [2, 0, 2], bias=bias)
    for y, e in zip(ys, only):
        torch.testing.assert_close(y, e)
    nothing = ops.goctconv([x0], weight[:, :0], [4], bias=bias)[0]
    torch.testing.assert_close(nothing, bias.view(1, 4, 1, 1).expand(2, 4, 8, 8))


@pytest.mark.parametrize("dilation", [1, 2, 5, 16])
def test_goctconv_depthwise(dilation):
    x0, x1, weight, bias, slope = tensors((2, 2, 8, 12), (2, 3, 4, 6), (5, 1, 3, 3), (5,), (5,))
    full = weight.numpy()
    expected = []
    for x, first in ((x0, 0), (x1, 2)):
        planes = [
            convolve(x[:, c : c + 1].numpy(), full[first + c : first + c + 1], dilation)
            for c in range(x.shape[1])
        ]
        expected.append(np.concatenate(planes, axis=1))
    assert_close(ops.goctconv_depthwise_reference([x0, x1], weight, dilation), expected)
    assert_close(
        ops.goctconv_depthwise_reference([x0, x1], weight, dilation, bias, slope),
        [
            epilogue(expected[0], bias[:2].numpy(), slope[:2].numpy()),
            epilogue(expected[1], bias[2:].numpy(), slope[2:].numpy()),
        ],
    )


def test_goctconv_dilated():
    dilations, out_channels = (1, 2, 4), ((2, 0, 1), (0, 3, 1))
    x0, x1, w0, w1, bias, slope = tensors(
        (2, 2, 8, 8), (2, 3, 4, 4), (3, 2, 3, 3), (4, 3, 3, 3), (7,), (7,)
    )
    expected = []
    for x, weight, row in ((x0, w0, out_channels[0]), (x1, w1, out_channels[1])):
        kernels = np.split(weight.numpy(), np.cumsum(row)[:-1])
        parts = [convolve(x.numpy(), k, d) for k, d in zip(kernels, dilations) if len(k)]
        expected.append(np.concatenate(parts, axis=1))
    arguments = ([x0, x1], [w0, w1], dilations, out_channels)
    assert_close(ops.goctconv_dilated_reference(*arguments), expected)
    assert_close(
        ops.goctconv_dilated_reference(*arguments, bias, slope),
        [
            epilogue(expected[0], bias[:3].numpy(), slope[:3].numpy()),
            epilogue(expected[1], bias[3:].numpy(), slope[3:].numpy()),
        ],
    )


@pytest.mark.parametrize("training", [True, False])
def test_goctconv_norm_act(training):
    x0, x1, gamma, beta, slope, mean, var = tensors(
        (3, 2, 4, 4), (3, 3, 2, 2), (5,), (5,), (5,), (5,), (5,)
    )
    var = var.exp()
    ys, used_mean, used_var, channel_means = ops.goctconv_norm_act_reference(
        [x0, x1], gamma, beta, slope, mean, var, training, eps=1e-3
    )
    first = 0
    for x, y in ((x0, ys[0]), (x1, ys[1])):
        for c in range(x.shape[1]):
            values = x[:, c].numpy()
            m, v = mean[first + c].item(), var[first + c].item()
            if training:
                m, v = values.mean(), ((values - values.mean()) ** 2).mean()
            z = gamma[first + c].item() * (values - m) / np.sqrt(v + 1e-3) + beta[first + c].item()
            z = np.maximum(z, 0) + slope[first + c].item() * np.minimum(z, 0)
            np.testing.assert_allclose(y[:, c].numpy(), z, rtol=1e-11, atol=1e-12)
            np.testing.assert_allclose(channel_means[:, first + c], z.mean((1, 2)), rtol=1e-10)
            np.testing.assert_allclose([used_mean[first + c], used_var[first + c]], [m, v])
        first += x.shape[1]


def test_update_stats_agrees_with_torch(backend, device):
    norm = torch.nn.BatchNorm2d(3, momentum=0.3, device=device, dtype=float64)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    x = tensors((2, 3, 4, 4))[0].to(device)
    norm(x)
    batch_var, batch_mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    ops.goctconv_update_stats_(mean, var, batch_mean, batch_var, [3], [32], 0.3)
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(var, norm.running_var)


def test_update_stats_of_empty_and_single_valued_scales(backend, device):
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    batch_mean = torch.tensor([float("nan"), 2.0, 4.0], device=device)
    batch_var = torch.tensor([float("nan"), 0.0, 3.0], device=device)
    ops.goctconv_update_stats_(mean, var, batch_mean, batch_var, [1, 1, 1], [0, 1, 2], 0.5)
    assert mean.tolist() == [0.0, 1.0, 2.0]
    assert var.tolist() == [1.0, 0.5, 3.5]


def test_nan_propagates(backend, device):
    x, low = torch.zeros(1, 1, 8, 8, device=device), torch.zeros(1, 1, 4, 4, device=device)
    x[0, 0, 3, 3] = float("nan")
    ones = torch.ones(2, 2, 3, 3, device=device)
    high, low_out = ops.goctconv([x, low], ones, [1, 1])
    assert high.isnan()[0, 0, 2:5, 2:5].all() and not high.isnan()[0, 0, 6:].any()
    assert low_out.isnan()[0, 0, 0:3, 0:3].all() and not low_out.isnan()[0, 0, 3].any()
    vector = torch.ones(1, device=device)
    ys, *_ = ops.goctconv_norm_act([x], vector, vector, vector, vector, vector)
    assert ys[0].isnan().sum() == 1


X = torch.zeros(2, 3, 8, 8)
LOW = torch.zeros(2, 2, 4, 4)
W = torch.zeros(4, 5, 1, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.goctconv(X, W, [4]), TypeError, "xs must be a list"),
        (lambda: ops.goctconv([], W, [4]), ValueError, "1 to 4 scales, not 0"),
        (lambda: ops.goctconv([X[0]], W, [4]), ValueError, r"xs\[0\] must be .*\(3, 8, 8\)"),
        (lambda: ops.goctconv([X.long(), LOW], W, [4]), TypeError, "int64"),
        (lambda: ops.goctconv([X, LOW.double()], W, [4]), TypeError, "float64.*float32"),
        (lambda: ops.goctconv([X, LOW], W.double(), [4]), TypeError, "weight is torch.float64"),
        (lambda: ops.goctconv([X, LOW.to("meta")], W, [4]), ValueError, "meta.*cpu"),
        (lambda: ops.goctconv([X, LOW[:1]], W, [4]), ValueError, "batch size 1.*has 2"),
        (lambda: ops.goctconv([X, LOW[..., :3]], W, [4]), ValueError, "4x3.*8x8, divided by 2"),
        (lambda: ops.goctconv([X], W, [4]), ValueError, r"\(4, 3, 1, 1\), not \(4, 5, 1, 1\)"),
        (lambda: ops.goctconv([X, LOW], W, [3, 2]), ValueError, r"\(5, 5, 1, 1\)"),
        (lambda: ops.goctconv([X, LOW], W, [5, -1]), ValueError, "negative"),
        (lambda: ops.goctconv([X, LOW], W, [4, 0, 0, 0, 0]), ValueError, "not 5"),
        (lambda: ops.goctconv([X, LOW], W.expand(4, 5, 2, 2), [4]), ValueError, "1x1 or 3x3"),
        (lambda: ops.goctconv([X, LOW], W, [4], stride=3), ValueError, "stride.*3"),
        (lambda: ops.goctconv([X[..., :2, :2]], W[:, :3], [2, 1, 1]), ValueError, "2x2.*by 4"),
        (lambda: ops.goctconv([X[..., :1, :1]], W[:, :3], [4], 2), ValueError, "1x1, too small"),
        (
            lambda: ops.goctconv([X[..., :6, :], LOW[..., :3, :]], W, [4], 2),
            ValueError,
            "1x2 after stride 2.*3x4, divided by 2",
        ),
        (lambda: ops.goctconv([X, LOW], W, [4], bias=X[0, 0, 0]), ValueError, r"bias.*\(4,\)"),
        (lambda: ops.goctconv([X, LOW], W, [4], slope=X[0, 0, 0]), ValueError, r"slope.*\(4,\)"),
        (lambda: ops.goctconv([X[:, :, :0]], W[:, :3], [4]), ValueError, "empty size: 0x8"),
        (lambda: ops.goctconv_depthwise([X], W), ValueError, r"\(3, 1, 3, 3\)"),
        (
            lambda: ops.goctconv_depthwise([X], torch.zeros(3, 1, 3, 3), dilation=0),
            ValueError,
            "dilation.*0",
        ),
        (lambda: ops.goctconv_dilated([X], [], [1], [[1]]), ValueError, "1 scales, weights 0"),
        (lambda: ops.goctconv_dilated([X], [W], [1, 2], [[1]]), ValueError, r"out_channels\[0\]"),
        (lambda: ops.goctconv_dilated([X], [W], [0], [[1]]), ValueError, r"dilations.*\[0\]"),
        (lambda: ops.goctconv_dilated([X], [W], [1], [[4]]), ValueError, r"weights\[0\]"),
        (
            lambda: ops.goctconv_norm_act([X], *[torch.ones(3)] * 4, torch.ones(2)),
            ValueError,
            "running_var",
        ),
        (
            lambda: ops.goctconv_norm_act([X], *[torch.ones(3)] * 5, eps=-1.0),
            ValueError,
            "eps.*-1",
        ),
        (
            lambda: ops.goctconv_update_stats_(*[torch.ones(3)] * 4, [3], [9, 9], 0.1),
            ValueError,
            "counts",
        ),
        (
            lambda: ops.goctconv_update_stats_(*[torch.ones(3)] * 4, [3], [9], 1.5),
            ValueError,
            "momentum.*1.5",
        ),
    ],
)
def test_bad_input_is_refused_with_a_name_and_a_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
