"""Shapes of modules: networks that help what trains, and what happens to each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn
from transformers import BertConfig, BertModel, DeiTConfig, WhisperConfig, WhisperModel
from transformers import DeiTForImageClassificationWithTeacher as DeiT

METRIC, LOSS, FROZEN = "a metric", "a loss", "frozen by the module"


@dataclass(frozen=True)
class Shape:
    """A module, and what is expected where nothing is asked for.

    Attributes:
        name: Short name of the test.
        title: What a reader of the documentation recognises it by; ``""`` for a variant.
        module: Makes it.
        adapted: Submodules with adapters; every adapted layer is in one of them.
        left: Submodules that are left as they are, with the reason.
        trains: Submodules that train in full.
        eval: Submodules that stay in eval mode.
        follows: Submodules whose adapters follow others.
        given: Arguments of ``inject``.
        note: What a reader should know besides.
    """

    name: str
    title: str
    module: Callable[[], nn.Module]
    adapted: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)
    trains: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    follows: tuple[str, ...] = ()
    given: dict[str, Any] = field(default_factory=dict)
    note: str = ""


class Whole(nn.Module):
    """A module with the submodules that it is given."""

    def __init__(self, **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def net(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU and dropout between them; the dropout has number 2."""
    layers: list[nn.Module] = []
    for first, second in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(first, second), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers[:-2])


def convolutions(*channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for first, second in zip(channels, channels[1:], strict=False):
        layers += [nn.Conv2d(first, second, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def bert(width: int = 16) -> BertModel:
    size = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=32, intermediate_size=2 * width, max_position_embeddings=16, **size
    )
    return BertModel(config, add_pooling_layer=False)


def still(network: nn.Module) -> nn.Module:
    """Freezes a network and sets it to eval mode, as teachers are."""
    return network.eval().requires_grad_(False)


def fixed(network: nn.Module) -> nn.Module:
    """Freezes a network, which stays in train mode."""
    return network.requires_grad_(False)


class Distance(torchmetrics.Metric):
    """A metric that compares features of a network."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        self.total += self.features(x).mean()

    def compute(self) -> Tensor:
        return self.total


class FeatureLoss(nn.Module):
    """A loss that compares features of a network."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.features(a) - self.features(b)).pow(2).mean()


class Unet(nn.Module):
    __module__ = "diffusers.models.unets"

    def __init__(self) -> None:
        super().__init__()
        self.down, self.conv_out = nn.Linear(8, 16), nn.Linear(16, 8)

    def save_pretrained(self, folder: str) -> None:
        """What models of diffusers have."""


def momentum_pair(
    online: nn.Module, freeze: Callable[[nn.Module], nn.Module] | None, **rest: Any
) -> Whole:
    momentum = copy.deepcopy(online)
    return Whole(student=online, momentum=freeze(momentum) if freeze else momentum, **rest)


def shared_layer() -> Whole:
    trunk = nn.Linear(8, 16)
    return Whole(
        student=nn.Sequential(trunk, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)),
        teacher=nn.Sequential(trunk, nn.ReLU(), fixed(nn.Linear(16, 4))),
    )


def shared_frozen_layer() -> Whole:
    trunk = fixed(nn.Linear(8, 16))
    return Whole(
        student=nn.Sequential(trunk, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)),
        teacher=still(nn.Sequential(trunk, nn.ReLU(), nn.Linear(16, 4))),
    )


def metric_of_the_encoder() -> Whole:
    encoder = net(8, 16, 16)
    return Whole(distance=Distance(encoder), encoder=encoder, head=nn.Linear(16, 2))


def loss_of_the_model() -> Whole:
    model = bert()
    return Whole(loss=FeatureLoss(model), model=model)


def unregistered_teacher() -> Whole:
    module = Whole(student=net(8, 16, 16), head=nn.Linear(16, 4))
    module.__dict__["teachers"] = [still(net(8, 32, 4))]
    module.__dict__["by_name"] = {"large": still(net(8, 64, 4))}
    return module


def partly_frozen_bert() -> Whole:
    model = bert()
    fixed(model.embeddings)
    fixed(model.encoder.layer[0])
    return Whole(model=model, head=nn.Linear(16, 2))


def half_resting_bert() -> Whole:
    model = bert()
    model.encoder.layer[0].eval()
    return Whole(model=model, head=nn.Linear(16, 2))


def norms_train() -> Whole:
    trunk = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    fixed(trunk[0])
    fixed(trunk[2])
    return Whole(trunk=trunk, head=nn.Linear(16, 2))


def biases_train() -> Whole:
    module = Whole(trunk=net(8, 16, 16), head=nn.Linear(16, 2))
    for name, param in module.trunk.named_parameters():
        param.requires_grad_("bias" in name)
    return module


def whisper() -> nn.Module:
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = WhisperModel(
        WhisperConfig(
            **size, **heads, **tokens, encoder_ffn_dim=16, decoder_ffn_dim=16,
            decoder_start_token_id=1, max_source_positions=8, max_target_positions=8,
        )
    )  # fmt: skip
    fixed(model.encoder)
    return Whole(model=model)


def deit() -> nn.Module:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = DeiTConfig(**size, intermediate_size=16, image_size=8, patch_size=4, num_labels=3)
    return Whole(model=DeiT(config), teacher=still(net(8, 16, 3)))


def diffusion(text: nn.Module, unet: nn.Module | None = None) -> Whole:
    vae = Whole(encoder=net(8, 16, 4), decoder=net(4, 16, 8))
    return Whole(vae=still(vae), text=still(text), unet=unet or net(4, 16, 16, 4))


T = "teacher"
SHAPES = [
    # Teachers
    Shape(
        "teacher", "frozen teacher and student",
        lambda: Whole(teacher=still(net(8, 32, 4)), student=net(8, 16, 4)),
        ("student",), {T: FROZEN}, ("student.3",), (T,),
    ),
    Shape(
        "teacher in train mode", "",
        lambda: Whole(teacher=fixed(net(8, 32, 4)), student=net(8, 16, 4)),
        ("student",), {T: FROZEN}, ("student.3",),
    ),
    Shape(
        "teacher of transformers", "the same with two transformers or timm models",
        lambda: Whole(student=bert(), teacher=still(bert(32)), proj=nn.Linear(16, 32)),
        ("student",), {T: FROZEN}, ("proj",), (T,),
    ),
    Shape(
        "teacher of transformers, plain student", "a teacher of transformers, and another student",
        lambda: Whole(teacher=still(bert()), student=net(8, 16, 16)),
        ("student",), {T: FROZEN}, ("student.3",), (T,),
    ),
    Shape(
        "teacher in a container", "",
        lambda: Whole(model=Whole(teacher=still(net(8, 32, 4)), student=net(8, 16, 4))),
        ("model.student",), {"model.teacher": FROZEN}, ("model.student.3",), ("model.teacher",),
    ),
    Shape(
        "teacher of one layer", "",
        lambda: Whole(student=net(8, 16, 4), teacher=still(nn.Linear(8, 4))),
        ("student",), {T: FROZEN}, ("student.3",), (T,),
    ),
    Shape(
        "student of one layer and a head", "",
        lambda: Whole(student=nn.Linear(8, 16), head=nn.Linear(16, 4), teacher=still(net(8, 4))),
        ("student",), {T: FROZEN}, ("head",), (T,),
    ),
    Shape(
        "two teachers", "",
        lambda: Whole(student=bert(), one=still(bert(32)), two=fixed(bert(32))),
        ("student",), {"one": FROZEN, "two": FROZEN}, (), ("one",),
    ),
    Shape(
        "teacher outside", "teachers in a list or dict that the module does not register",
        unregistered_teacher, ("student",), {}, ("head",),
    ),
    Shape(
        "teacher that is not frozen", "teacher in eval mode that only `no_grad` shields",
        lambda: Whole(teacher=net(8, 32, 4).eval(), student=net(8, 16, 4), head=nn.Linear(4, 2)),
        ("teacher", "student"), {}, ("head",), (T,),
        note="it stays in eval mode; freeze it to leave it as it is",
    ),
    Shape(
        "model whose first block is in eval mode", "",
        half_resting_bert, ("model",), {}, ("head",), ("model.encoder.layer.0",),
    ),
    Shape(
        "shared layer", "student and frozen teacher that share a layer",
        shared_layer, ("student", "teacher.0"), {"teacher.2": FROZEN}, ("student.4",),
        note="what is shared trains, so it is adapted",
    ),
    Shape(
        "shared frozen layer", "",
        shared_frozen_layer, ("student.2",), {"student.0": FROZEN, T: FROZEN}, ("student.4",),
        eval=("student.0", T),
    ),
    Shape(
        "DeiT", "DeiT, which has a second head for distillation",
        deit, ("model.deit",), {T: FROZEN},
        ("model.cls_classifier", "model.distillation_classifier"), (T,),
    ),
    # Losses
    Shape(
        "perceptual", "frozen network inside of the loss",
        lambda: Whole(a=nn.Linear(8, 16), b=nn.Linear(16, 16), head=nn.Linear(16, 2),
                      vgg=fixed(net(16, 16, 16))),
        ("a", "b"), {"vgg": FROZEN}, ("head",),
    ),
    Shape(
        "perceptual of convolutions", "",
        lambda: Whole(generator=convolutions(3, 8, 8, 3), vgg=still(convolutions(3, 8, 8))),
        ("generator",), {"vgg": FROZEN}, ("generator.4",), ("vgg",),
    ),
    Shape(
        "perceptual of transformers", "",
        lambda: Whole(generator=net(8, 16, 16), lpips=still(bert())),
        ("generator",), {"lpips": LOSS}, ("generator.3",), ("lpips",),
    ),
    Shape(
        "clip guides a generator", "frozen transformers model that guides another network",
        lambda: Whole(clip=still(bert()), generator=net(8, 16, 16)),
        ("generator",), {"clip": FROZEN}, ("generator.3",), ("clip",),
    ),
    Shape(
        "loss class", "a loss as a module: `torch.nn`'s, or called `...Loss`, `loss`, `criterion`",
        lambda: Whole(trunk=net(8, 16, 16), head=nn.Linear(16, 2), like=FeatureLoss(net(2, 8, 8))),
        ("trunk",), {"like": LOSS}, ("head", "like"),
        note="what trains in it trains in full",
    ),
    Shape(
        "loss by name", "",
        lambda: Whole(trunk=net(8, 16, 16), head=nn.Linear(16, 2), recon_loss=still(net(2, 8, 8))),
        ("trunk",), {"recon_loss": LOSS}, ("head",), ("recon_loss",),
    ),
    Shape(
        "loss of torch", "",
        lambda: Whole(loss=nn.CrossEntropyLoss(torch.ones(2)), trunk=net(8, 8, 8), out=net(8, 2)),
        ("trunk",), {}, ("out",),
    ),
    Shape(
        "loss that is given the model", "a loss that the adapted model was given to",
        loss_of_the_model, ("model",), {"loss": LOSS},
    ),
    Shape(
        "loss that alone has the model", "",
        lambda: Whole(loss=FeatureLoss(bert())), ("loss.features",),
    ),
    # Metrics
    Shape(
        "metric", "a `torchmetrics.Metric` with a network",
        lambda: Whole(a=nn.Linear(8, 16), b=nn.Linear(16, 16), out=nn.Linear(16, 2),
                      fid=Distance(still(net(8, 8, 3)))),
        ("a", "b"), {"fid": METRIC}, ("out",), ("fid.features",),
    ),
    Shape(
        "metric that trains", "",
        lambda: Whole(trunk=net(8, 16, 16), out=nn.Linear(16, 2), fid=Distance(net(8, 8, 3))),
        ("trunk",), {"fid": METRIC}, ("out", "fid"),
    ),
    Shape(
        "metrics", "",
        lambda: Whole(
            metrics=torchmetrics.MetricCollection(
                {"far": Distance(still(net(8, 8, 3))), "near": Distance(still(net(8, 4, 3)))}
            ),
            trunk=net(8, 16, 16), out=nn.Linear(16, 2),
        ),
        ("trunk",), {"metrics": METRIC}, ("out",),
        ("metrics.far.features", "metrics.near.features"),
    ),
    Shape(
        "metric of transformers", "",
        lambda: Whole(trunk=net(8, 16, 16), out=nn.Linear(16, 2), score=Distance(still(bert()))),
        ("trunk",), {"score": METRIC}, ("out",), ("score.features",),
    ),
    Shape(
        "metric of transformers next to a model", "",
        lambda: Whole(score=Distance(still(bert())), model=bert()),
        ("model",), {"score": METRIC}, (), ("score.features",),
    ),
    Shape(
        "metric that is given the encoder", "a metric that the adapted encoder was given to",
        metric_of_the_encoder, ("encoder",), {"distance": METRIC}, ("head",),
    ),
    # Copies
    Shape(
        "momentum copy", "momentum copy that is frozen (MoCo, DINO)",
        lambda: momentum_pair(net(8, 16, 16), still, predictor=net(16, 4)),
        ("student", "momentum"), {}, ("predictor",), ("momentum",), ("momentum",),
        note="its adapters follow",
    ),
    Shape(
        "momentum copy that trains", "momentum copy that is not frozen (BYOL)",
        lambda: momentum_pair(net(8, 16, 16), None, predictor=net(16, 4)),
        ("student", "momentum"), {}, ("predictor",),
        note="its adapters follow, where no optimizer holds them",
    ),
    Shape(
        "momentum copy of transformers", "the same of a transformers or timm model",
        lambda: momentum_pair(bert(), still, predictor=net(16, 4)),
        ("student", "momentum"), {}, ("predictor",), ("momentum",), ("momentum",),
        note="its adapters follow",
    ),
    Shape(
        "momentum copy of transformers that trains", "",
        lambda: momentum_pair(bert(), None, predictor=net(16, 4)),
        ("student", "momentum"), {}, ("predictor",),
    ),
    Shape(
        "momentum copy of a model and its projection", "",
        lambda: momentum_pair(nn.Sequential(bert(), net(16, 8)), fixed),
        ("student.0", "momentum.0"), {}, ("student.1",), (), ("momentum.0",),
    ),
    Shape(
        "actor and critic", "actor and critic with target networks",
        lambda: Whole(
            critic=(critic := net(8, 16, 16)), actor=(actor := net(8, 32, 16)),
            target_critic=fixed(copy.deepcopy(critic)), target_actor=fixed(copy.deepcopy(actor)),
        ),
        ("critic", "actor.0", "target_critic", "target_actor.0"), {}, ("actor.3",), (),
        ("target_critic", "target_actor"),
        note="the last layer is a head, in the copy too",
    ),
    Shape(
        "copy of the whole network", "",
        lambda: momentum_pair(net(8, 16, 16), still),
        ("student.0", "momentum.0"), {}, ("student.3",), ("momentum",), ("momentum",),
    ),
    # Diffusion
    Shape(
        "diffusion", "VAE, text encoder and the network that trains",
        lambda: diffusion(net(8, 16, 8)),
        ("unet",), {"vae": FROZEN, "text": FROZEN}, ("unet.6",), ("vae", "text"),
    ),
    Shape(
        "diffusion with transformers", "the same with a text encoder of transformers",
        lambda: diffusion(bert()),
        ("unet",), {"text": FROZEN, "vae": FROZEN}, ("unet.6",), ("vae", "text"),
        note="where what trains is called `unet`, `denoiser`, `student`, `generator` or the like; "
        "else name it in `adapt`",
    ),
    Shape(
        "diffusion of diffusers", "the same with models of diffusers",
        lambda: diffusion(bert(), Unet()),
        ("unet",), {"text": FROZEN, "vae": FROZEN}, (), ("vae", "text"),
    ),
    # A frozen encoder and what is on top of it
    Shape(
        "frozen encoder", "frozen encoder and a fresh head",
        lambda: Whole(encoder=fixed(net(8, 16, 16)), head=nn.Linear(16, 2)),
        ("encoder",), {}, ("head",),
        note="all that is pretrained is frozen: it is adapted",
    ),
    Shape(
        "frozen encoder in eval mode", "",
        lambda: Whole(encoder=still(net(8, 16, 16)), readout=nn.Linear(16, 2)),
        ("encoder",), {}, ("readout",),
    ),
    Shape(
        "frozen encoder and a projector", "frozen encoder and several fresh layers",
        lambda: Whole(encoder=fixed(net(8, 16, 16)), projector=net(16, 16, 4)),
        ("encoder",), {}, ("projector",),
        note="where they are called `head`, `projector`, `mlp` or the like",
    ),
    Shape(
        "frozen encoder of transformers", "frozen transformers or timm model and a fresh head",
        lambda: Whole(encoder=still(bert()), head=nn.Linear(16, 2)), ("encoder",), {}, ("head",),
    ),
    Shape(
        "frozen encoder of transformers and a decoder", "",
        lambda: Whole(encoder=still(bert()), decoder=net(16, 16, 16, 2)),
        ("encoder",), {}, ("decoder",),
    ),
    Shape(
        "two frozen encoders", "two frozen models and a fresh head that joins them",
        lambda: Whole(text=still(bert()), image=still(bert(32)), head=net(48, 16, 2)),
        ("text", "image"), {}, ("head",),
    ),
    Shape(
        "frozen encoder and a teacher", "",
        lambda: Whole(encoder=fixed(net(8, 16, 16)), head=nn.Linear(16, 4),
                      teacher=still(net(8, 32, 4))),
        ("encoder",), {T: FROZEN}, ("head",), (T,),
    ),
    # All frozen, partly frozen
    Shape(
        "all frozen", "all frozen",
        lambda: fixed(Whole(trunk=net(8, 16, 16), head=nn.Linear(16, 2))), ("trunk",),
    ),
    Shape("all frozen of transformers", "", lambda: Whole(model=still(bert())), ("model",)),
    Shape(
        "partly frozen", "first layers frozen",
        lambda: Whole(first=fixed(net(8, 16)), second=net(16, 16, 16), head=nn.Linear(16, 2)),
        ("second",), {"first": FROZEN}, ("head",),
        note="the frozen ones stay as they are",
    ),
    Shape(
        "partly frozen transformers", "first layers of a transformers or timm model frozen",
        partly_frozen_bert, ("model",), {}, ("head",),
        note="such a model is adapted as one",
    ),
    Shape("only norms train", "", norms_train, ("trunk",), {}, ("head",)),
    Shape("only biases train", "", biases_train, ("trunk",), {}, ("head",)),
    Shape("Whisper with its encoder frozen", "", whisper, ("model",)),
    # Several networks
    Shape(
        "one tower frozen", "two towers, one of them frozen (LiT)",
        lambda: Whole(image=still(bert(32)), text=bert(), scale=net(2, 2)),
        ("text",), {"image": FROZEN}, ("scale",), ("image",),
    ),
    Shape(
        "one plain tower frozen", "",
        lambda: Whole(image=fixed(net(8, 16, 16)), text=net(8, 32, 16), logit=net(16, 1)),
        ("text",), {"image": FROZEN}, ("logit",),
    ),
    Shape(
        "both towers train", "two towers that train",
        lambda: Whole(image=bert(32), text=bert()), ("image", "text"),
    ),
    Shape(
        "GAN with a feature net", "GAN whose discriminator has a frozen feature network",
        lambda: Whole(
            generator=net(8, 16, 16),
            discriminator=Whole(features=still(net(16, 16, 16)), judge=net(16, 8, 1)),
        ),
        ("generator", "discriminator.judge"), {"discriminator.features": FROZEN},
        ("discriminator.judge.3",), ("discriminator.features",),
    ),
    Shape(
        "policy, reference and reward", "policy with reference and reward models",
        lambda: Whole(policy=(policy := bert()), reference=still(copy.deepcopy(policy)),
                      reward=still(bert(32))),
        ("policy", "reference"), {"reward": FROZEN}, (), ("reference", "reward"), ("reference",),
        note="a copy follows, and stays what it was where nothing averages it",
    ),
    # What is asked for
    Shape(
        "adapt names the teacher", "a frozen part that `adapt` names",
        lambda: Whole(student=net(8, 16, 4), teacher=still(net(8, 32, 4))),
        ("teacher",), {}, ("student", ), given={"adapt": "teacher"},
        note="is adapted",
    ),
    Shape(
        "target_modules names the teacher", "a frozen part that `target_modules` names",
        lambda: Whole(student=net(8, 16, 4), teacher=still(net(8, 32, 4))),
        ("student", "teacher"), {}, given={"target_modules": r"(student|teacher)\.\d"},
        note="is adapted",
    ),
    Shape(
        "target_modules of any", "`target_modules` that match layers of it besides others",
        lambda: Whole(student=net(8, 16, 4), teacher=still(net(8, 32, 4))),
        ("student",), {T: FROZEN}, (), (T,), given={"target_modules": ["0", "3"]},
        note="leave it as it is",
    ),
    Shape(
        "exclude_modules", "a part that `exclude_modules` names, frozen or not",
        lambda: Whole(student=net(8, 16, 4), old=net(8, 32, 4), head=nn.Linear(4, 2)),
        ("student",), {}, ("head",), given={"exclude_modules": r"old\..*"},
        note="gets no adapters; under QLoRA its layers are quantized, since it is part of the base",
    ),
]  # fmt: skip
