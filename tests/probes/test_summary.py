import copy
import dataclasses
import gc
import io
import random
from typing import Any

import numpy as np
import pytest
import rich.console
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from stoker.errors import UserError
from stoker.probes.summary import Row, Summary, summary


def row(table: Summary, name: str) -> Row:
    (found,) = [row for row in table.rows if row.name == name]
    return found


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


class Branches(nn.Module):
    """Control flow on a value: fake tensors cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.embed = nn.Embedding(6, 4, max_norm=0.1)  # its forward rewrites its weight
        self.big, self.small = nn.Linear(4, 100), nn.Linear(4, 1)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        x = self.norm(x) + self.embed(torch.randint(6, x.shape[:1]))
        x.add_(random.random() + np.random.rand())
        return self.big(x) if x.abs().sum() > 0 else self.small(x)


# ---- the numbers of one pass


def test_every_number_of_a_small_convnet() -> None:
    table = summary(convnet(), torch.zeros(2, 3, 4, 4))
    assert [(row.name, row.class_name, row.depth) for row in table.rows] == [
        ("", "Sequential", 0),
        ("0", "Conv2d", 1),
        ("1", "BatchNorm2d", 1),
        ("2", "ReLU", 1),
        ("3", "Flatten", 1),
        ("4", "Linear", 1),
    ]
    conv, linear = row(table, "0"), row(table, "4")
    assert (conv.input_shapes, conv.output_shapes) == (((2, 3, 4, 4),), ((2, 8, 4, 4),))
    assert (conv.own_trainable_params, conv.own_frozen_params, conv.total_params) == (224, 0, 224)
    assert conv.macs == 2 * 16 * 8 * 3 * 9  # positions x channels out x channels in x kernel
    assert conv.output_bytes == 2 * 8 * 16 * 4
    assert linear.macs == 2 * 128 * 10
    assert table.macs == conv.macs + linear.macs == row(table, "").macs
    assert table.total_params == table.trainable_params == 224 + 16 + 1290
    assert table.param_bytes == table.gradient_bytes == 4 * table.total_params
    assert table.buffer_bytes == 8 * 4 * 2 + 8  # running mean and variance; an int64 counter
    assert table.note == ""


def test_activations_count_views_and_in_place_results_once() -> None:
    # convolution; normalisation, which ReLU overwrites and Flatten only looks at; linear
    assert summary(convnet(), torch.zeros(2, 3, 4, 4)).activation_bytes == 4 * (256 + 256 + 20)


def test_saved_bytes_are_what_backward_needs() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    table = summary(model, torch.zeros(5, 16))
    # the input, and tanh's output, which the second layer saves as well
    assert table.saved_bytes == 4 * (5 * 16 + 5 * 32)
    assert row(table, "1").saved_bytes == 4 * 5 * 32
    assert table.training_bytes == 2 * table.param_bytes + table.saved_bytes
    model[0].requires_grad_(False)
    assert summary(model, torch.zeros(5, 16)).saved_bytes == 4 * 5 * 32
    assert summary(model.requires_grad_(False), torch.zeros(5, 16)).saved_bytes == 0


def test_tensors_of_a_discarded_graph_are_not_counted_as_saved() -> None:
    class Discards(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x).exp()
            return super().forward(x)

    assert summary(Discards(8, 8), torch.zeros(3, 8)).saved_bytes == 4 * 3 * 8


def test_the_fallback_saves_as_many_bytes_as_fake_tensors() -> None:
    class Looks(nn.Module):
        def __init__(self, body: nn.Module, look: bool) -> None:
            super().__init__()
            self.body, self.look = body, look

        def forward(self, x: Tensor) -> Tensor:
            if self.look:
                x.sum().item()
            return self.body(x)

    fake, real = (summary(Looks(convnet(), look), torch.zeros(2, 3, 4, 4)) for look in (False, True))
    assert fake.note == "" and "ran for real" in real.note
    assert dataclasses.replace(real, note="") == fake


def test_frozen_parameters_are_apart() -> None:
    model = convnet()
    model[4].requires_grad_(False)
    table = summary(model, torch.zeros(2, 3, 4, 4))
    assert (table.trainable_params, table.frozen_params) == (240, 1290)
    assert table.gradient_bytes == 4 * 240
    assert (row(table, "4").own_trainable_params, row(table, "4").own_frozen_params) == (0, 1290)
    assert row(table, "").total_frozen_params == 1290
    assert "Frozen" in str(table) and "Frozen" not in str(summary(convnet(), torch.zeros(2, 3, 4, 4)))


def test_tied_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    table = summary(Tied(), torch.zeros(2, 3, dtype=torch.long))
    assert table.total_params == row(table, "").total_params == 400
    assert [row(table, name).own_tied_params for name in ("embed", "head")] == [0, 400]
    assert "400 (tied)" in str(table)


# ---- calls


def test_a_reused_module_is_one_row_with_its_calls() -> None:
    class Reuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.often = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.often(x)
            return self.once(x[:1])

    table = summary(Reuse(), torch.zeros(2, 8))
    often = row(table, "often")
    assert (often.calls, often.macs, often.output_bytes, often.shapes_vary) == (3, 3 * 2 * 64, 3 * 64, False)
    assert [row.name for row in table.rows] == ["", "often", "once"]  # in the order of execution
    assert "Calls" in str(table)


def test_varying_shapes_are_marked() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.conv(x), self.conv(x[..., ::2])]

    table = summary(Pyramid(), torch.zeros(1, 3, 8, 8))
    assert row(table, "conv").shapes_vary
    assert row(table, "conv").output_shapes == ((1, 3, 8, 8),)
    assert row(table, "").output_shapes == ((1, 3, 8, 8), (1, 3, 8, 4))
    assert "1x3x8x8 …" in str(table) and "1x3x8x8 +1" in str(table)


def test_idle_bypassed_and_containing_modules_are_told_apart() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(7, 7)
            self.layers = nn.ModuleList([nn.Linear(8, 8)])
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            return self.attention(x, x, x)[0]

    table = summary(Block(), torch.zeros(5, 2, 8))
    status = {row.name: row.status for row in table.rows}
    assert status == {
        "": "called",
        "layers": "container",
        "layers.0": "called",
        "attention": "called",
        "attention.out_proj": "weights used",  # the functional attention takes them
        "idle": "not called",
    }
    assert row(table, "layers").macs == row(table, "layers.0").macs == 10 * 64
    assert row(table, "layers").saved_bytes == row(table, "layers.0").saved_bytes == 10 * 8 * 4
    assert row(table, "idle").total_params == 56 and row(table, "idle").calls == 0
    assert "not called" in str(table)


def test_a_forward_that_fails_inside_and_is_caught_keeps_attribution_right() -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrong, self.right = nn.Sequential(nn.Linear(3, 3)), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.wrong(x)
            except RuntimeError:
                return self.right(x)

    table = summary(Tries(), torch.zeros(2, 4))
    assert (row(table, "wrong").macs, row(table, "right").macs, table.macs) == (0, 32, 32)
    assert row(table, "wrong").calls == 0


# ---- what may be passed, what may come back


def test_batches_and_outputs_of_every_form() -> None:
    @dataclasses.dataclass
    class Out:
        logits: Tensor
        extra: dict[str, list[Tensor]]

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, a: Tensor, b: Tensor | None = None) -> Out:
            return Out(self.linear(a), {"b": [a if b is None else b]})

    a, b = torch.zeros(2, 4), torch.zeros(5)
    both = summary(Two(), (a, b))
    assert row(both, "").input_shapes == ((2, 4), (5,))
    assert row(both, "").output_shapes == ((2, 3), (5,))
    assert summary(Two(), [a, b]) == summary(Two(), {"a": a, "b": b}) == both
    assert row(summary(Two(), a), "").output_shapes == ((2, 3), (2, 4))


def test_packed_sequences() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.zeros(5, 4), torch.zeros(3, 4)])
    table = summary(nn.LSTM(4, 6), (packed,))
    assert row(table, "").input_shapes[0] == (8, 4)
    assert table.macs == 8 * 4 * 6 * (4 + 6)


def test_the_caller_may_have_switched_autograd_off() -> None:
    model, x = convnet(), torch.zeros(2, 3, 4, 4)
    expected = summary(model, x)
    with torch.no_grad():
        assert summary(model, x) == expected
    with torch.inference_mode():
        assert summary(model, x) == expected


def test_weight_norm_as_hook_and_as_parametrization() -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        hooked = nn.utils.weight_norm(nn.Linear(4, 3))  # its `weight` is no leaf: a plain copy fails
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    for model in (hooked, parametrized):
        table = summary(model, torch.zeros(2, 4))
        assert (table.total_params, table.macs, table.note) == (4 * 3 + 3 + 3, 24, "")


def test_a_compiled_model_is_its_module() -> None:
    model = convnet()
    x = torch.zeros(2, 3, 4, 4)
    assert summary(torch.compile(model, backend="eager"), x) == summary(model, x)


# ---- multiplications that torch's counter does not know, or hides


@pytest.mark.parametrize(
    ("model", "batch", "macs"),
    [
        (nn.LSTM(8, 16, 2), torch.zeros(5, 3, 8), 15 * 4 * 16 * ((8 + 16) + (16 + 16))),
        (nn.LSTM(8, 16, bidirectional=True), torch.zeros(5, 3, 8), 2 * 15 * 4 * 16 * (8 + 16)),
        (nn.GRU(8, 16, 2), torch.zeros(5, 3, 8), 15 * 3 * 16 * ((8 + 16) + (16 + 16))),
        (nn.Bilinear(4, 5, 6), (torch.zeros(7, 4), torch.zeros(7, 5)), 7 * 4 * 5 * 6),
        # projections 4 * 15 * 16 * 16, and two products of 3 samples, 5 x 5 positions, 16 channels
        (nn.MultiheadAttention(16, 4), (torch.zeros(5, 3, 16),) * 3, 4 * 15 * 256 + 2 * 3 * 25 * 16),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), torch.zeros(1, 4, 5, 5), 25 * 4 * 6 * 4),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_macs_by_hand(model: nn.Module, batch: Any, macs: int) -> None:
    assert summary(model, batch).macs == macs


def test_macs_of_a_frozen_encoder_in_eval_mode() -> None:
    """Its fused path is one operator that no counter looks into."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    expected = summary(model, torch.zeros(2, 3, 8)).macs
    assert expected == 6 * (4 * 64 + 2 * 8 * 16) + 2 * 2 * 9 * 8
    assert summary(model.eval().requires_grad_(False), torch.zeros(2, 3, 8)).macs == expected
    assert torch.backends.mha.get_fastpath_enabled()


class Product(nn.Module):
    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.operation(*inputs)


@pytest.mark.parametrize(
    ("operation", "shapes", "macs"),
    [
        (torch.mv, [(4, 5), (5,)], 20),
        (torch.dot, [(9,), (9,)], 9),
        (torch.addmv, [(4,), (4, 5), (5,)], 20),
        (torch.addbmm, [(2, 4), (3, 2, 5), (3, 5, 4)], 3 * 2 * 5 * 4),
        (torch.einsum, ["bij,bjk->bik", (3, 2, 5), (3, 5, 4)], 3 * 2 * 5 * 4),
    ],
)
def test_macs_of_products(operation: Any, shapes: list[Any], macs: int) -> None:
    text = [shape for shape in shapes if isinstance(shape, str)]
    inputs = tuple(torch.ones(shape) for shape in shapes if not isinstance(shape, str))
    assert summary(Product(lambda *tensors: operation(*text, *tensors)), inputs).macs == macs


def test_a_parent_has_the_macs_of_its_children_and_of_its_own_operations() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) @ self.b(x).T

    table = summary(Own(), torch.zeros(3, 4))
    assert row(table, "a").macs == row(table, "b").macs == 48
    assert row(table, "").macs == 48 + 48 + 3 * 4 * 3


# ---- the model is left alone


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything a forward could change; tensors as bytes, so that NaN equals NaN."""
    found: dict[str, Any] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found[f"grad {name}"] = parameter.grad.clone() if parameter.grad is not None else torch.empty(0)
        found[f"version {name}"] = (id(parameter), parameter._version, parameter.requires_grad)
    for name, module in model.named_modules():
        found[f"module {name}"] = (id(module), type(module), module.training, sorted(vars(module)))
        found[f"hooks {name}"] = (dict(module._forward_hooks), dict(module._forward_pre_hooks))
    found["rng"] = torch.get_rng_state()
    found["random"], found["numpy"] = random.getstate(), repr(np.random.get_state())
    found["global hooks"] = dict(torch_module._global_forward_hooks)
    found["global pre-hooks"] = dict(torch_module._global_forward_pre_hooks)
    found["seen"] = getattr(model, "seen", None)
    return {key: value.numpy().tobytes() if isinstance(value, Tensor) else value for key, value in found.items()}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("build", [convnet, Branches])
def test_model_batch_and_generators_are_left_bit_for_bit(build: Any, train: bool) -> None:
    model = build()
    batch = torch.randn(8, 4) if build is Branches else torch.randn(2, 3, 4, 4)
    model(batch).sum().backward()
    next(model.children()).train(not train)
    model.train(train)
    next(iter(model.modules())).register_forward_hook(lambda module, args, output: output * 2)
    before, batch_before = fingerprint(model), batch.clone()
    table = summary(model, batch)
    assert ("ran for real" in table.note) == (build is Branches)
    assert fingerprint(model) == before
    assert torch.equal(batch, batch_before)


def test_a_batch_that_the_model_overwrites_is_left_alone() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) if x.sum() > 0 else x

    batch = torch.ones(3)
    summary(Overwrites(), batch)
    assert torch.equal(batch, torch.ones(3))


@pytest.mark.parametrize("model", [Branches(), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Softmax(-1))])
def test_nothing_stays_in_memory(model: nn.Module) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    summary(model, torch.randn(8, 4))
    before = tensors()
    summary(model, torch.randn(8, 4))
    assert tensors() == before


# ---- models that need care


def test_lazy_modules_are_inferred_in_a_copy() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(10))
    table = summary(model, torch.zeros(2, 3, 6, 6))
    assert [row.class_name for row in table.rows[1:]] == ["Conv2d", "Flatten", "Linear"]
    assert table.total_params == 8 * 27 + 8 + 128 * 10 + 10
    assert "still uninitialised" in table.note
    assert isinstance(model[0], nn.LazyConv2d) and model[2].has_uninitialized_params()


def test_a_model_on_meta() -> None:
    with torch.device("meta"):  # 40 GB, if it were anywhere
        model = nn.Sequential(nn.Linear(100_000, 100_000), nn.Linear(100_000, 1))
    table = summary(model, torch.zeros(1, 100_000))
    assert table.total_params == 100_000 * 100_001 + 100_001
    assert table.macs == 100_000 * 100_001
    assert model[0].weight.is_meta


def test_a_value_dependent_model_on_meta_runs_on_made_up_values() -> None:
    with torch.device("meta"):
        model = Branches()
    table = summary(model, torch.ones(8, 4))
    assert "values were made up" in table.note and "ran for real" in table.note
    assert row(table, "big").calls == 1


def test_a_copy_that_cannot_fit_is_refused_before_it_is_made() -> None:
    class Huge(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with torch.device("meta"):
        model = Huge(2_000_000, 2_000_000)  # 16 TB
    with pytest.raises(UserError, match="does not fit into memory"):
        summary(model, torch.zeros(1, 2_000_000))


def test_train_mode_that_fails_gives_way_to_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    table = summary(model, torch.zeros(1, 4))
    assert "ran in eval mode" in table.note and "more than 1 value per channel" in table.note
    assert "Note" in str(table)
    assert model.training and summary(model.eval(), torch.zeros(1, 4)).note == ""


def test_a_batch_that_does_not_fit_is_explained() -> None:
    with pytest.raises(UserError) as caught:
        summary(nn.Linear(4, 2), torch.zeros(3, 5))
    assert str(caught.value).startswith("Linear does not run on this batch.")
    assert "3x5 and 4x2" in caught.value.why
    assert "model(**batch)" in caught.value.remedy


# ---- text


def test_text_is_aligned_and_long_names_lose_their_beginning() -> None:
    inner: nn.Module = nn.Linear(4, 4)
    for index in range(12):
        inner = nn.Sequential().append(inner) if index % 2 else nn.ModuleDict({"quite_long": inner})
        inner = inner if isinstance(inner, nn.Sequential) else Pass(inner)
    table = summary(inner, torch.zeros(1, 4))
    lines = str(table).splitlines()
    header, rule, *body = lines[: len(table.rows) + 3]
    assert set(rule) == {"-"} == set(body[-1])
    params_end = header.index("Params") + len("Params")
    assert [line[params_end - 2 : params_end + 1] for line in body[:-1]] == ["20 "] * len(table.rows)
    deepest = max(table.rows, key=lambda row: row.depth)
    assert len(deepest.name) > 44
    assert body[-2].startswith("…" + deepest.name[-43:] + "  Linear")
    assert {line.index(line.split()[1]) for line in body[:-1]} == {header.index("Class")}


class Pass(nn.Module):
    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return self.held["quite_long"](x)


def test_depth_limits_what_is_shown_and_nothing_else() -> None:
    model = nn.Sequential(convnet())
    full, top = (summary(model, torch.zeros(2, 3, 4, 4), depth=depth) for depth in (None, 1))
    assert [row.name for row in top.shown] == ["", "0"]
    assert dataclasses.replace(top, depth=None) == full
    assert "0.4" in str(full) and "0.4" not in str(top)


def test_rich_shows_the_same_cells_as_the_text() -> None:
    table = summary(convnet(), torch.zeros(2, 3, 4, 4))
    console = rich.console.Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    shown = console.export_text()
    for word in str(table).replace("-", " ").split():
        assert word in shown


# ---- published models


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [
        ("resnet50", 25_557_032, 4.089),
        ("vgg16", 138_357_544, 15.470),
        ("vit_b_16", 86_567_656, 17.564),
        ("mobilenet_v2", 3_504_872, 0.301),
    ],
)
def test_published_torchvision_figures(name: str, params: int, gmacs: float) -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is an extra")
    with torch.device("meta"):
        model = getattr(models, name)()
    table = summary(model, torch.zeros(1, 3, 224, 224))
    assert table.total_params == params
    assert round(table.macs / 1e9, 3) == gmacs
    published = models.get_model_weights(name).DEFAULT.meta
    assert published["num_params"] == params
    assert round(table.macs / 1e9, 1) == round(published["_ops"], 1)


def test_detection_runs_for_real() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is an extra")
    build = models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    few = {"min_size": 64, "max_size": 64, "rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20}
    model = build(weights=None, weights_backbone=None, **few).eval()
    table = summary(model, ([torch.rand(3, 64, 64)],))
    assert "ran for real" in table.note and "eval mode" not in table.note
    assert table.total_params == sum(parameter.numel() for parameter in model.parameters())
    assert row(table, "").output_shapes[0][1] == 4  # boxes
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}]
    training = summary(model.train(), ([torch.rand(3, 64, 64)], targets))
    assert "eval mode" not in training.note and row(training, "").output_shapes == ((),) * 4  # losses


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [
        ("tf_efficientnet_lite0", 4_652_008, 0.385),
        ("swin_tiny_patch4_window7_224", 28_288_354, 4.491),
        ("convnext_tiny", 28_589_128, 4.456),
        ("mobilevit_xxs", 1_272_024, 0.407),
        ("lambda_resnet26t", 10_958_272, 3.003),
    ],
)
def test_timm_families(name: str, params: int, gmacs: float) -> None:
    timm = pytest.importorskip("timm", reason="timm is an extra")
    with torch.device("meta"):
        model = timm.create_model(name)
    size = model.default_cfg["input_size"]
    table = summary(model, torch.zeros(2, *size))
    assert (table.total_params, table.note) == (params, "")
    assert round(table.macs / 2e9, 3) == gmacs


def tokens(batch: int = 2, length: int = 16) -> dict[str, Tensor]:
    ids = torch.ones(batch, length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ids}


def test_published_transformers_parameter_counts() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig())
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    assert summary(bert, tokens()).total_params == 109_482_240
    table = summary(gpt2, tokens())
    assert table.total_params == 124_439_808  # the head is tied to the embedding
    assert row(table, "lm_head").own_tied_params == row(table, "transformer.wte").total_params == 50257 * 768
    assert row(table, "lm_head").macs == 32 * 50257 * 768


@pytest.mark.parametrize("name", ["Mixtral", "T5", "Wav2Vec2", "Mamba"])
def test_transformers_families_and_their_next_real_forward(name: str) -> None:
    """What a fake forward leaves in a library's caches would break the next real one."""
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    extra = {"Mixtral": {"num_key_value_heads": 2}, "T5": {"d_model": 32, "d_ff": 64, "num_layers": 2}}
    config = getattr(transformers, f"{name}Config")(**small | extra.get(name, {}))
    model = getattr(transformers, f"{name}Model")(config).eval()
    batch: dict[str, Tensor] = {"input_values": torch.randn(1, 4000)} if name == "Wav2Vec2" else tokens()
    if name == "T5":
        batch["decoder_input_ids"] = batch["input_ids"]
    twin = copy.deepcopy(model)
    table = summary(model, batch)
    assert table.total_params == sum(parameter.numel() for parameter in model.parameters())
    assert table.macs > 0
    expected, given = (forward(**batch)[0] for forward in (twin, model))
    assert torch.equal(expected, given)


def test_no_hook_is_left_behind() -> None:
    summary(nn.Linear(2, 2), torch.zeros(1, 2))
    assert not torch.nn.modules.module._has_any_global_hook()
