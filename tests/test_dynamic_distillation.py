"""The loss of dynamic distillation against the paper's equations, written out in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from sodfast.nn import DynamicDistillationLoss

PAPER = {
    "p": 0.7, "temperature": 5.0, "threshold": 0.5, "epsilon": 0.01, "fixed_weight": None,
    "temperature_squared": True, "kl_mean": "pixels",
}  # fmt: skip


def equations(student, teacher, truth, options):
    """Eq. 1–6, image by image, of float64 maps: loss, θ, α, β."""
    temperature, thetas, alphas, betas, losses = options["temperature"], [], [], [], []

    def iou(logits, g):  # Eq. 1
        prediction = 1 / (1 + (-logits).exp())
        union = (prediction + g - prediction * g).sum()
        return (prediction * g).sum() / union if union > 0 else torch.ones_like(union)

    def log_distribution(logits):  # of the two values of a pixel, salient and not
        return torch.stack([logits, torch.zeros_like(logits)]).log_softmax(0)

    for z, t, g in zip(student, teacher, truth):
        alpha, beta = iou(t, g), 1 - iou(z, g)  # Eq. 2
        theta = torch.tanh(alpha ** options["p"] * beta ** (1 - options["p"]))  # Eq. 3
        if options["threshold"] is not None and not alpha > options["threshold"]:
            theta = torch.full_like(theta, options["epsilon"])  # Eq. 6
        if options["fixed_weight"] is not None:
            theta = torch.full_like(theta, options["fixed_weight"])
        theta = theta.detach()
        kl = F.kl_div(
            log_distribution(z / temperature), log_distribution(t / temperature),
            reduction="none", log_target=True,
        )  # fmt: skip
        kl = kl.mean() if options["kl_mean"] == "pixels_and_classes" else kl.sum(0).mean()
        kl = kl * temperature**2 if options["temperature_squared"] else kl
        salient, not_salient = log_distribution(z)
        ce = -(g * salient + (1 - g) * not_salient).mean()
        losses.append(theta * kl + (1 - theta) * ce)  # Eq. 5
        for values, value in ((thetas, theta), (alphas, alpha), (betas, beta)):
            values.append(value.detach())
    stacked = [torch.stack(values) for values in (thetas, alphas, betas)]
    return torch.stack(losses).mean(), *stacked


def picture(name):
    """Student's and teacher's logits and truth, (B, 1, H, W), float32 values in float64."""
    draw = torch.Generator().manual_seed(5)
    student, teacher, noise = (
        3 * torch.randn(3, 1, 37, 29, generator=draw).double() for _ in range(3)
    )
    truth = (teacher + noise > 1).double()
    certain = 1e4 * (2 * truth - 1)
    if name == "empty truth":
        truth = torch.zeros_like(truth)
    elif name == "empty truth, empty maps":
        truth = torch.zeros_like(truth)
        student = teacher = torch.full_like(truth, -1e4)
    elif name == "soft truth":
        truth = torch.rand(truth.shape, generator=draw).double()
    elif name == "perfect teacher":
        teacher = certain
    elif name == "perfect student":
        student = certain
    elif name == "nearly perfect":
        student, teacher = 8 * (2 * truth - 1), 15 * (2 * truth - 1)
    elif name == "extreme":
        student, teacher = 1e4 * student.sign(), 1e4 * teacher.sign()
    elif name == "at the threshold":
        # Of 4, 3 and 5 pixels the teacher has 2, 2 and 2: α is ½, ⅔ and ⅖.
        truth, teacher = torch.zeros(3, 1, 4, 5), torch.full((3, 1, 4, 5), -1e4)
        for i, pixels in enumerate((4, 3, 5)):
            truth[i].view(-1)[:pixels] = 1
            teacher[i].view(-1)[:2] = 1e4
        truth, teacher, student = truth.double(), teacher.double(), student[..., :4, :5]
    else:
        assert name == "random"
    return [x.float().double() for x in (student, teacher, truth)]


PICTURES = (
    "random", "empty truth", "empty truth, empty maps", "soft truth", "perfect teacher",
    "perfect student", "nearly perfect", "extreme", "at the threshold",
)  # fmt: skip
OPTIONS = {
    "paper": {},
    "without noise elimination": {"threshold": None},
    "fixed": {"fixed_weight": 0.3},
    "T 10, without T²": {"temperature": 10.0, "temperature_squared": False},
    "halved": {"kl_mean": "pixels_and_classes"},
    "other numbers": {"p": 0.25, "threshold": 0.2, "epsilon": 0.05, "temperature": 1.5},
    "p 1": {"p": 1.0, "threshold": None},
    "p 0": {"p": 0.0, "threshold": None},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", PICTURES)
def test_loss_and_gradient_are_the_equations(name, options, dtype, backend, device):
    if dtype == torch.float64 and backend in ("cuda", "triton"):
        pytest.skip("the GPU's kernels are not made for float64")
    wide = picture(name)
    wide[0].requires_grad_()
    expected = equations(*wide, {**PAPER, **OPTIONS[options]})
    (expected_gradient,) = torch.autograd.grad(expected[0], wide[0])

    student, *others = (x.detach().to(device, dtype) for x in wide)
    student.requires_grad_()
    found = DynamicDistillationLoss(**OPTIONS[options])(student, *others)
    (gradient,) = torch.autograd.grad(found.loss, student)
    assert [x.requires_grad for x in found] == [True, False, False, False]
    assert found.loss.dtype == gradient.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for value, exact in zip(found, expected):
        torch.testing.assert_close(
            value.detach().double().cpu(), exact.detach(), rtol=tolerance, atol=tolerance
        )
    # Of the loss summed over images and pixels: a logit's gradient is then of order one.
    pixels = student.numel()
    torch.testing.assert_close(
        pixels * gradient.double().cpu(), pixels * expected_gradient, rtol=tolerance,
        atol=tolerance * max(1.0, pixels * expected_gradient.abs().max().item()),
    )  # fmt: skip


def test_the_threshold_is_strict(backend, device):
    student, teacher, truth = (x.float().to(device) for x in picture("at the threshold"))
    theta, alpha = DynamicDistillationLoss()(student, teacher, truth)[1:3]
    assert alpha[0].item() == 0.5
    assert theta[0].item() == theta[2].item() == pytest.approx(0.01)
    assert theta[1] > 0.1
    below = DynamicDistillationLoss(threshold=0.49)(student, teacher, truth).theta
    assert below[0] > 0.1


def test_a_fixed_weight_of_zero_is_cross_entropy(backend, device):
    student, teacher, truth = (x.float().to(device) for x in picture("random"))
    found = DynamicDistillationLoss(fixed_weight=0.0)(student, teacher, truth)
    torch.testing.assert_close(found.loss, F.binary_cross_entropy_with_logits(student, truth))
    assert found.theta.tolist() == [0, 0, 0] and found.alpha.min() > 0.1


def test_gradcheck(backend, device):
    """θ as a constant: it is what a fixed weight would be."""
    if backend in ("cuda", "triton"):
        pytest.skip("the GPU's kernels are not made for float64")
    student, teacher, truth = (x[:2, ..., :4, :5].to(device) for x in picture("random"))
    student = student.clone().requires_grad_()
    criterion = DynamicDistillationLoss(fixed_weight=0.4, temperature=3.0)
    assert torch.autograd.gradcheck(lambda z: criterion(z, teacher, truth).loss, student)


def test_no_gradient_to_teacher_and_truth(backend, device):
    student, teacher, truth = (x.float().to(device).requires_grad_() for x in picture("random"))
    DynamicDistillationLoss()(student, teacher, truth).loss.backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None and truth.grad is None


@pytest.mark.parametrize("which", range(3))
def test_nan_propagates(which, backend, device):
    maps = [x.float().to(device) for x in picture("random")]
    maps[which][1, 0, 3, 4] = math.nan
    found = DynamicDistillationLoss()(*maps)
    assert found.loss.isnan()
    assert not found.theta[[0, 2]].isnan().any() and found.theta[1].isnan()


def test_nothing_and_one_pixel(backend, device):
    student, teacher, truth = (x.float().to(device) for x in picture("random"))
    student.requires_grad_()
    found = DynamicDistillationLoss()(student[:0], teacher[:0], truth[:0])
    assert found.loss.item() == 0 and found.theta.shape == (0,)
    found.loss.backward()
    assert not student.grad.any()
    one = [x[..., :1, :1] for x in (student, teacher, truth)]
    assert DynamicDistillationLoss()(*one).loss.isfinite()


def test_half_precision_is_computed_in_float32(backend, device):
    student, teacher, truth = (x.float().to(device) for x in picture("random"))
    half = [student.bfloat16().requires_grad_(), teacher.bfloat16(), truth]
    found = DynamicDistillationLoss()(*half)
    expected = DynamicDistillationLoss()(half[0].float(), half[1].float(), truth)
    assert found.loss.dtype == torch.float32 and torch.equal(found.loss, expected.loss)
    found.loss.backward()
    assert half[0].grad.dtype == torch.bfloat16 and half[0].grad.abs().max() > 0


def test_channels_last_and_strides(backend, device):
    student, teacher, truth = (x.float().to(device) for x in picture("random"))
    expected = DynamicDistillationLoss()(student, teacher, truth)
    strided = DynamicDistillationLoss()(
        student.contiguous(memory_format=torch.channels_last),
        torch.stack([teacher, truth], -1)[..., 0],
        truth.transpose(2, 3).contiguous().transpose(2, 3),
    )
    for a, b in zip(strided, expected):
        torch.testing.assert_close(a, b)


def test_compiles_without_a_graph_break(backend, device):
    criterion = DynamicDistillationLoss()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    found = []
    for function in (criterion, compiled):
        student, teacher, truth = (x.float().to(device) for x in picture("random"))
        student.requires_grad_()
        result = function(student, teacher, truth)
        found.append([*result, *torch.autograd.grad(result.loss, student)])
    torch.testing.assert_close(*found)


def test_noise_elimination_keeps_a_wrong_teacher_out(backend, device):
    """After some steps the student is near the truth where the teacher is right; where half of
    what the teacher finds is wrong, only with noise elimination."""
    truth = torch.zeros(2, 1, 16, 16, device=device)
    truth[..., 4:11, 5:13] = 1
    teacher = 8 * (2 * truth - 1)
    teacher[1] = teacher[1].roll(4, 1)
    ends = {}
    for threshold in (0.5, None):
        criterion = DynamicDistillationLoss(threshold=threshold)
        student = torch.zeros_like(truth, requires_grad=True)
        optimizer = torch.optim.Adam([student], lr=0.3)
        for _ in range(100):
            optimizer.zero_grad()
            found = criterion(student, teacher, truth)
            found.loss.backward()
            optimizer.step()
        ends[threshold] = found
    assert ends[0.5].alpha[0] > 0.99 and 0.2 < ends[0.5].alpha[1] < 0.3
    assert ends[0.5].beta[0] < 0.01 and ends[None].beta[0] < 0.01
    assert ends[0.5].theta[1].item() == pytest.approx(0.01) and ends[0.5].beta[1] < 0.15
    assert ends[None].theta[1] > 0.1 and ends[None].beta[1] > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, "p must be in 0–1, not 1.5"),
        ({"p": math.nan}, "p must be in 0–1, not nan"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, not 0.0"),
        ({"temperature": math.inf}, "temperature.*not inf"),
        ({"threshold": -0.1}, "threshold must be in 0–1, not -0.1"),
        ({"epsilon": 2.0}, "epsilon must be in 0–1, not 2.0"),
        ({"fixed_weight": 1.1}, "fixed_weight must be in 0–1, not 1.1"),
        ({"kl_mean": "half"}, "kl_mean must be 'pixels' or 'pixels_and_classes', not 'half'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicDistillationLoss(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": "abc"}, "p must be a number, not 'abc'"),
        ({"threshold": "none"}, "threshold must be a number, not 'none'"),
        ({"epsilon": None}, "epsilon must be a number, not None"),
        ({"temperature": True}, "temperature must be a number, not True"),
        ({"temperature_squared": "no"}, "temperature_squared must be a bool, not 'no'"),
    ],
)
def test_options_of_another_type_are_refused_by_name(options, message):
    with pytest.raises(TypeError, match=message):
        DynamicDistillationLoss(**options)


def test_integers_are_refused_and_a_truth_of_bool_is_taken(backend, device):
    """A truth of 0 and 255 would have an IoU above 1."""
    logits = torch.randn(2, 1, 8, 8, device=device)
    truth = torch.rand(2, 1, 8, 8, device=device) > 0.5
    criterion = DynamicDistillationLoss()
    for place, name in enumerate(("student_logits", "teacher_logits", "truth")):
        maps = [logits, logits, truth.float()]
        maps[place] = maps[place].to(torch.uint8)
        with pytest.raises(TypeError, match=f"{name} must be floating point, not torch.uint8"):
            criterion(*maps)
    assert criterion(logits, logits, truth).loss == criterion(logits, logits, truth.float()).loss


def test_maps_that_do_not_fit_are_refused(backend, device):
    maps = torch.zeros(2, 1, 4, 5, device=device)
    criterion = DynamicDistillationLoss()
    with pytest.raises(ValueError, match=r"teacher_logits.*\(2, 1, 4, 5\), not \(2, 1, 4, 4\)"):
        criterion(maps, maps[..., :4], maps)
    with pytest.raises(ValueError, match=r"student_logits must be \(B, 1, H, W\)"):
        criterion(*[maps.expand(2, 3, 4, 5)] * 3)


def test_options_are_shown():
    shown = repr(DynamicDistillationLoss(p=0.6, threshold=None))
    assert "p=0.6" in shown and "threshold=None" in shown and "kl_mean='pixels'" in shown
