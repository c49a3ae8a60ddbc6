"""One small model of every class that uses a backbone, with what it is called with beside the image.

Weights are random with a seed and sized so that every layer passes its input on: the outputs depend on the image. A class
that the installed release of transformers does not have is not in ``CLIENTS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn


@dataclass(frozen=True)
class Client:
    """A model in eval mode, the image size it is tried with, and its other arguments.

    ``main``: the output that a user reads. ``frames``: images per sample, for models of videos.
    """

    model: nn.Module
    height: int
    width: int
    main: str = "logits"
    batch: int = 2
    frames: int = 0
    channels: int = 3
    arguments: dict[str, Any] = field(default_factory=dict)
    dataset_index: int = 0

    def images(self, seed: int) -> torch.Tensor:
        """Coarse patches of colour and some noise: they differ in more than noise, which an average would remove."""
        generator = torch.Generator().manual_seed(seed)
        count = self.batch * max(self.frames, 1)
        coarse = torch.randn(count, self.channels, 3, 4, generator=generator)
        noise = torch.randn(count, self.channels, self.height, self.width, generator=generator)
        images = nn.functional.interpolate(2 * coarse, size=(self.height, self.width)) + 0.5 * noise
        return images.unflatten(0, (self.batch, self.frames)) if self.frames else images

    def __call__(self, pixel_values: torch.Tensor, model: nn.Module | None = None, **more: Any) -> Any:
        with torch.no_grad():
            return (model or self.model)(pixel_values=pixel_values, **self.arguments, **more)


CLIENTS: dict[str, Callable[[], Client]] = {}

_HELD = frozenset(dir(transformers))  # asking for a class would import its module


def client(*needed: str) -> Callable[[Callable[[], Client]], Callable[[], Client]]:
    """Adds a maker to CLIENTS where transformers has the classes that it needs."""

    def register(make: Callable[[], Client]) -> Callable[[], Client]:
        if _HELD.issuperset(needed):
            CLIENTS[make.__name__] = make
        return make

    return register


def trained_like(model: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Weights that keep the size of what passes through (or multiply it by ``gain``), and batch-norm statistics as training
    leaves them; eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if parameter.ndim > 1:
                parameter.copy_(gain * normal(parameter) / math.sqrt(parameter[0].numel()))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * normal(parameter))
            else:  # scales of norms, layers and activations
                parameter.mul_(uniform(parameter, 0.5, 1.5))
        for _, module in sorted(model.named_modules(), key=lambda item: item[0]):
            if getattr(module, "running_mean", None) is not None:  # batch norms, frozen ones too
                module.running_mean.copy_(0.3 * normal(module.running_mean))
                module.running_var.copy_(uniform(module.running_var, 0.5, 2))
                module.weight.copy_(uniform(module.weight, 0.5, 1.5))
                module.bias.copy_(0.3 * normal(module.bias))
    return model.eval()


def tensors(output: Any, name: str = "output") -> dict[str, torch.Tensor]:
    """Every tensor in an output of a model, by its path in it."""
    if isinstance(output, torch.Tensor):
        return {name: output}
    if isinstance(output, (list, tuple, dict)):
        items = output.items() if isinstance(output, dict) else enumerate(output)
        return {path: t for key, value in items for path, t in tensors(value, f"{name}.{key}").items()}
    return {}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in float64. Masked places hold huge numbers: those
    must be the same."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    actual, expected = actual.detach().double(), expected.detach().double()
    masked = ~(expected.abs() < 1e30)
    assert torch.equal(masked, ~(actual.abs() < 1e30))
    actual, expected = actual[~masked], expected[~masked]
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


# ---- backbones ------------------------------------------------------------------------------------------------------

_OWN_WEIGHTS: dict[str, Any] = {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False}
"""transformers 4.44 wants to hear that nothing is to be downloaded."""

_VIT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}


def _resnet(**options: Any) -> Any:
    settings = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return transformers.ResNetConfig(**{**settings, "out_features": ["stage2", "stage3", "stage4"], **options})


def _swin(**options: Any) -> Any:
    settings = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
    return transformers.SwinConfig(
        **{**settings, "image_size": 64, "out_features": ["stage1", "stage2", "stage3", "stage4"], **options}
    )


def _hgnet(**options: Any) -> Any:
    return transformers.HGNetV2Config(
        **{
            "stem_channels": [3, 8, 8],
            "stage_in_channels": [8, 16, 24, 32],
            "stage_mid_channels": [8, 8, 8, 8],
            "stage_out_channels": [16, 24, 32, 48],
            "hidden_sizes": [16, 24, 32, 48],
            "stage_num_blocks": [1, 1, 1, 1],
            "stage_numb_of_layers": [2, 2, 2, 2],
            "use_learnable_affine_block": True,
            "out_features": ["stage2", "stage3", "stage4"],
            **options,
        }
    )


def _dinov2(**options: Any) -> Any:
    settings = {**_VIT, "image_size": 56, "patch_size": 14, "out_features": ["stage1", "stage2"]}
    return transformers.Dinov2Config(**{**settings, "reshape_hidden_states": False, **options})


# ---- detection ------------------------------------------------------------------------------------------------------

_DETR: dict[str, Any] = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 5,
    "num_labels": 4,
}
_TIMM: dict[str, Any] = {"use_timm_backbone": True, "backbone": "test_resnet", "use_pretrained_backbone": False}


@client("DetrForObjectDetection")
def detr() -> Client:
    config = transformers.DetrConfig(**_DETR, **_OWN_WEIGHTS, backbone_config=_resnet(), d_model=32)
    return Client(trained_like(transformers.DetrForObjectDetection(config)), 64, 96)


@client("DetrForObjectDetection")
def detr_timm() -> Client:
    config = transformers.DetrConfig(**_DETR, **_TIMM, d_model=32)
    return Client(trained_like(transformers.DetrForObjectDetection(config)), 64, 96)


@client("DetrForSegmentation")
def detr_segmentation() -> Client:
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    config = transformers.DetrConfig(**{**_DETR, **heads}, **_TIMM, d_model=128)
    return Client(trained_like(transformers.DetrForSegmentation(config)), 64, 96, main="pred_masks")


@client("ConditionalDetrForObjectDetection")
def conditional_detr() -> Client:
    config = transformers.ConditionalDetrConfig(**_DETR, **_TIMM, d_model=32)
    return Client(trained_like(transformers.ConditionalDetrForObjectDetection(config)), 64, 96)


@client("DeformableDetrForObjectDetection")
def deformable_detr() -> Client:
    config = transformers.DeformableDetrConfig(**_DETR, **_TIMM, d_model=32)
    return Client(trained_like(transformers.DeformableDetrForObjectDetection(config)), 64, 96)


@client("TableTransformerForObjectDetection")
def table_transformer() -> Client:
    config = transformers.TableTransformerConfig(**_DETR, **_TIMM, d_model=32)
    return Client(trained_like(transformers.TableTransformerForObjectDetection(config)), 64, 96)


@client("DabDetrForObjectDetection")
def dab_detr() -> Client:
    config = transformers.DabDetrConfig(**_DETR, **_TIMM, hidden_size=32)
    return Client(trained_like(transformers.DabDetrForObjectDetection(config)), 64, 96)


def _rt_detr(channels: list[int], **options: Any) -> dict[str, Any]:
    return {
        **_DETR,
        "encoder_in_channels": channels,
        "decoder_in_channels": [32, 32, 32],
        "encoder_hidden_dim": 32,
        "d_model": 32,
        "num_denoising": 0,
        **options,
    }


@client("RTDetrForObjectDetection")
def rt_detr() -> Client:
    backbone = transformers.RTDetrResNetConfig(**{**_resnet().to_dict(), "model_type": "rt_detr_resnet"})
    config = transformers.RTDetrConfig(**_rt_detr([16, 24, 32]), **_OWN_WEIGHTS, backbone_config=backbone)
    return Client(trained_like(transformers.RTDetrForObjectDetection(config)), 64, 96)


@client("RTDetrV2ForObjectDetection")
def rt_detr_v2() -> Client:
    backbone = transformers.RTDetrResNetConfig(**{**_resnet().to_dict(), "model_type": "rt_detr_resnet"})
    config = transformers.RTDetrV2Config(**_rt_detr([16, 24, 32]), backbone_config=backbone)
    return Client(trained_like(transformers.RTDetrV2ForObjectDetection(config)), 64, 96)


@client("DFineForObjectDetection")
def d_fine() -> Client:
    config = transformers.DFineConfig(**_rt_detr([24, 32, 48]), backbone_config=_hgnet())
    return Client(trained_like(transformers.DFineForObjectDetection(config)), 64, 96)


@client("Deimv2ForObjectDetection")
def deim_v2() -> Client:
    config = transformers.Deimv2Config(**_rt_detr([24, 32, 48]), backbone_config=_hgnet())
    return Client(trained_like(transformers.Deimv2ForObjectDetection(config)), 64, 96)


@client("Deimv2ForObjectDetection", "DINOv3ViTConfig")
def deim_v2_dinov3() -> Client:
    """It reads ``backbone.config.patch_size`` in every forward."""
    backbone = transformers.DINOv3ViTConfig(
        **{**_VIT, "num_hidden_layers": 3}, intermediate_size=64, out_features=["stage1", "stage2", "stage3"]
    )
    options = {"encoder_type": "hybrid", "spatial_tuning_adapter_inplanes": 8}
    config = transformers.Deimv2Config(**_rt_detr([32, 32, 32], **options), backbone_config=backbone)
    return Client(trained_like(transformers.Deimv2ForObjectDetection(config)), 64, 96)


@client("PPDocLayoutV2ForObjectDetection")
def pp_doc_layout_v2() -> Client:
    config = transformers.PPDocLayoutV2Config(
        **_rt_detr([24, 32, 48]),
        backbone_config=_hgnet(),
        class_thresholds=[0.0] * 4,
        class_order=[0, 1, 2, 3],
        reading_order_config={
            "hidden_size": 24,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "coordinate_size": 4,
            "shape_size": 4,
            "num_classes": 4,
        },
    )
    return Client(trained_like(transformers.PPDocLayoutV2ForObjectDetection(config)), 64, 96)


@client("PPDocLayoutV3ForObjectDetection")
def pp_doc_layout_v3() -> Client:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.PPDocLayoutV3Config(
        **_rt_detr([24, 32, 48]),
        backbone_config=_hgnet(out_features=stages),
        x4_feat_dim=16,
        mask_feature_channels=[16, 16],
    )
    return Client(trained_like(transformers.PPDocLayoutV3ForObjectDetection(config)), 64, 96)


@client("PPDocLayoutV4ForObjectDetection")
def pp_doc_layout_v4() -> Client:
    settings = _rt_detr([24, 32, 48])
    config = transformers.PPDocLayoutV4Config(
        **{k: v for k, v in settings.items() if k != "d_model"}, hidden_size=32, backbone_config=_hgnet()
    )
    return Client(trained_like(transformers.PPDocLayoutV4ForObjectDetection(config)), 64, 96)


_WINDOWED: dict[str, Any] = {
    "d_model": 32,
    "num_labels": 4,
    "decoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "num_queries": 5,
    "group_detr": 1,
    "c2f_num_blocks": 1,
}


@client("LwDetrForObjectDetection")
def lw_detr() -> Client:
    backbone = transformers.LwDetrViTConfig(
        **_VIT,
        image_size=64,
        pretrain_image_size=48,
        num_windows=4,
        window_block_indices=[0],
        out_features=["stage1", "stage2"],
    )
    config = transformers.LwDetrConfig(**_WINDOWED, backbone_config=backbone, projector_scale_factors=[1.0])
    return Client(trained_like(transformers.LwDetrForObjectDetection(config)), 64, 96)


@client("RfDetrForObjectDetection")
def rf_detr() -> Client:
    backbone = transformers.RfDetrDinov2Config(
        **_VIT, image_size=56, patch_size=14, num_windows=2, out_features=["stage1", "stage2"]
    )
    config = transformers.RfDetrConfig(**_WINDOWED, backbone_config=backbone)
    return Client(trained_like(transformers.RfDetrForObjectDetection(config)), 56, 84)


_BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 1100,
    "max_position_embeddings": 16,
}
_GROUNDED: dict[str, Any] = {**_DETR, "d_model": 32, "text_config": _BERT, "fusion_droppath": 0.0, "max_text_len": 8}
_PROMPT = torch.tensor([[101, 7, 1012, 9, 1012, 102]] * 2)  # "[CLS] word . word . [SEP]"


@client("GroundingDinoForObjectDetection")
def grounding_dino() -> Client:
    config = transformers.GroundingDinoConfig(
        **_GROUNDED, **_OWN_WEIGHTS, backbone_config=_swin(out_features=["stage2", "stage3", "stage4"])
    )
    model = trained_like(transformers.GroundingDinoForObjectDetection(config))
    return Client(model, 64, 96, arguments={"input_ids": _PROMPT})


@client("MMGroundingDinoForObjectDetection")
def mm_grounding_dino() -> Client:
    config = transformers.MMGroundingDinoConfig(
        **_GROUNDED, backbone_config=_swin(out_features=["stage2", "stage3", "stage4"])
    )
    model = trained_like(transformers.MMGroundingDinoForObjectDetection(config))
    return Client(model, 64, 96, arguments={"input_ids": _PROMPT})


@client("OmDetTurboForObjectDetection")
def om_det_turbo() -> Client:
    text = {"model_type": "clip_text_model", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.OmDetTurboConfig(
        text_config={**text, "intermediate_size": 32, "vocab_size": 50, "projection_dim": 24, "eos_token_id": 49},
        backbone_config=_swin(out_features=["stage2", "stage3", "stage4"]),
        apply_layernorm_after_vision_backbone=False,
        encoder_in_channels=[32, 64, 128],
        image_size=96,
        vision_features_channels=[32, 32, 32],
        encoder_hidden_dim=32,
        encoder_attention_heads=2,
        encoder_dim_feedforward=32,
        decoder_hidden_dim=32,
        decoder_num_heads=2,
        decoder_num_layers=1,
        decoder_dim_feedforward=32,
        class_embed_dim=24,
        text_projection_in_dim=24,
        text_projection_out_dim=24,
        task_encoder_hidden_dim=32,
        num_queries=5,
    )
    tokens = torch.tensor([[48, 3, 49], [48, 4, 49], [48, 5, 49], [48, 6, 49]])
    arguments = {
        "classes_input_ids": tokens,
        "classes_attention_mask": torch.ones_like(tokens),
        "tasks_input_ids": tokens[:2],
        "tasks_attention_mask": torch.ones_like(tokens[:2]),
        "classes_structure": torch.tensor([2, 2]),
    }
    model = trained_like(transformers.OmDetTurboForObjectDetection(config))
    return Client(model, 64, 96, main="decoder_class_logits", arguments=arguments)


# ---- segmentation ---------------------------------------------------------------------------------------------------


@client("UperNetForSemanticSegmentation")
def upernet() -> Client:
    config = transformers.UperNetConfig(
        **_OWN_WEIGHTS, backbone_config=_swin(), hidden_size=32, auxiliary_in_channels=64, auxiliary_channels=16
    )
    return Client(trained_like(transformers.UperNetForSemanticSegmentation(config)), 64, 96)


@client("MaskFormerForInstanceSegmentation")
def mask_former() -> Client:
    decoder = transformers.DetrConfig(**_DETR, **_TIMM, d_model=32)
    config = transformers.MaskFormerConfig(
        **_OWN_WEIGHTS,
        backbone_config=_swin(),
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=4,
    )
    model = trained_like(transformers.MaskFormerForInstanceSegmentation(config))
    return Client(model, 64, 96, main="masks_queries_logits")


@client("Mask2FormerForUniversalSegmentation")
def mask2_former() -> Client:
    config = transformers.Mask2FormerConfig(
        **_OWN_WEIGHTS,
        backbone_config=_swin(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=5,
        num_labels=4,
    )
    model = trained_like(transformers.Mask2FormerForUniversalSegmentation(config))
    return Client(model, 64, 96, main="masks_queries_logits")


@client("OneFormerForUniversalSegmentation")
def one_former() -> Client:
    config = transformers.OneFormerConfig(
        **_OWN_WEIGHTS,
        backbone_config=_swin(),
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=5,
        num_labels=4,
        task_seq_len=8,
        text_encoder_width=32,
        text_encoder_context_length=8,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=50,
        text_encoder_n_ctx=4,
    )
    model = trained_like(transformers.OneFormerForUniversalSegmentation(config))
    task = torch.arange(16).reshape(2, 8)
    return Client(model, 64, 96, main="masks_queries_logits", arguments={"task_inputs": task})


@client("VitMatteForImageMatting")
def vit_matte() -> Client:
    backbone = transformers.VitDetConfig(
        **_VIT,
        image_size=64,
        pretrain_image_size=48,
        num_channels=4,
        window_size=3,
        window_block_indices=[0],
        residual_block_indices=[1],
        use_relative_position_embeddings=True,
        out_features=["stage2"],
    )
    config = transformers.VitMatteConfig(
        **_OWN_WEIGHTS,
        backbone_config=backbone,
        hidden_size=32,
        convstream_hidden_sizes=[8, 16, 24],
        fusion_hidden_sizes=[32, 16, 16, 8],
    )
    model = trained_like(transformers.VitMatteForImageMatting(config))
    return Client(model, 64, 96, main="alphas", channels=4)


# ---- depth ----------------------------------------------------------------------------------------------------------

_DEPTH: dict[str, Any] = {
    "reassemble_factors": [2, 1],
    "neck_hidden_sizes": [16, 32],
    "fusion_hidden_size": 16,
}


@client("DepthAnythingForDepthEstimation")
def depth_anything() -> Client:
    config = transformers.DepthAnythingConfig(
        **_DEPTH, **_OWN_WEIGHTS, backbone_config=_dinov2(), reassemble_hidden_size=32, head_hidden_size=8
    )
    model = trained_like(transformers.DepthAnythingForDepthEstimation(config))
    return Client(model, 56, 84, main="predicted_depth")


@client("PromptDepthAnythingForDepthEstimation")
def prompt_depth_anything() -> Client:
    config = transformers.PromptDepthAnythingConfig(
        **_DEPTH, backbone_config=_dinov2(), reassemble_hidden_size=32, head_hidden_size=8
    )
    model = trained_like(transformers.PromptDepthAnythingForDepthEstimation(config))
    prompt = torch.rand(2, 1, 8, 12, generator=torch.Generator().manual_seed(3))
    return Client(model, 56, 84, main="predicted_depth", arguments={"prompt_depth": prompt})


@client("DPTForDepthEstimation")
def dpt() -> Client:
    config = transformers.DPTConfig(
        **_DEPTH,
        **_OWN_WEIGHTS,
        backbone_config=_dinov2(),
        patch_size=14,
        hidden_size=32,
        neck_ignore_stages=[],
    )
    return Client(trained_like(transformers.DPTForDepthEstimation(config)), 56, 84, main="predicted_depth")


@client("DPTForDepthEstimation")
def dpt_hybrid() -> Client:
    backbone = transformers.BitConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24],
        depths=[1, 1, 1],
        layer_type="bottleneck",
        num_groups=4,
        global_padding="same",
        embedding_dynamic_padding=True,
        out_features=["stage1", "stage2", "stage3"],
    )
    config = transformers.DPTConfig(
        is_hybrid=True,
        backbone_config=backbone,
        backbone_featmap_shape=[1, 24, 4, 4],
        image_size=64,
        patch_size=16,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 16, 24, 32],
        neck_ignore_stages=[0, 1],
        fusion_hidden_size=16,
    )
    return Client(trained_like(transformers.DPTForDepthEstimation(config)), 64, 64, main="predicted_depth")


@client("ZoeDepthForDepthEstimation")
def zoe_depth() -> Client:
    backbone = transformers.BeitConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
        use_relative_position_bias=True,
        reshape_hidden_states=False,
        layer_scale_init_value=1.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.ZoeDepthConfig(
        neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=16,
        backbone_config=backbone,
        num_relative_features=8,
        bottleneck_features=16,
        num_attractors=[4, 4, 2, 1],
        bin_embedding_dim=8,
        bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0}],
    )
    return Client(trained_like(transformers.ZoeDepthForDepthEstimation(config)), 64, 96, main="predicted_depth")


@client("CHMv2ForDepthEstimation")
def chm_v2() -> Client:
    """It reads the class token of every stage."""
    backbone = transformers.DINOv3ViTConfig(
        **_VIT,
        intermediate_size=64,
        num_register_tokens=2,
        return_class_token=True,
        out_features=["stage1", "stage2"],
    )
    config = transformers.CHMv2Config(
        backbone_config=backbone,
        reassemble_factors=[2, 1],
        post_process_channels=[16, 32],
        fusion_hidden_size=16,
        head_hidden_size=8,
        number_output_channels=16,
    )
    return Client(trained_like(transformers.CHMv2ForDepthEstimation(config)), 64, 96, main="predicted_depth")


@client("Tipsv2DptForDepthEstimation")
def tips_v2_dpt() -> Client:
    backbone = {
        **_VIT,
        "model_type": "tipsv2_vision_model",
        "image_size": 56,
        "out_indices": [1, 2],
        "reshape_hidden_states": False,
    }
    config = transformers.Tipsv2DptConfig(**_DEPTH, backbone_config=backbone, num_depth_bins=16)
    model = trained_like(transformers.Tipsv2DptForDepthEstimation(config))
    return Client(model, 56, 84, main="predicted_depth")


# ---- documents ------------------------------------------------------------------------------------------------------

_LCNET: dict[str, Any] = {
    "block_configs": [
        [[3, 8, 16, 1, False]],
        [[3, 16, 16, 2, False]],
        [[3, 16, 24, 2, False]],
        [[3, 24, 32, 2, False]],
        [[5, 32, 48, 2, True]],
    ],
    "stem_channels": 8,
    "out_indices": [2, 3, 4, 5],
}


@client("PPOCRV5MobileDetForObjectDetection")
def pp_ocr_det() -> Client:
    config = transformers.PPOCRV5MobileDetConfig(
        backbone_config={**_LCNET, "model_type": "pp_lcnet_v3"},
        neck_out_channels=16,
        layer_list_out_channels=[8, 8, 16, 16],
    )
    model = trained_like(transformers.PPOCRV5MobileDetForObjectDetection(config))
    return Client(model, 64, 96, main="last_hidden_state")


@client("SLANetForTableRecognition")
def sla_net() -> Client:
    config = transformers.SLANetConfig(
        backbone_config={**_LCNET, "model_type": "pp_lcnet"},
        post_conv_out_channels=16,
        out_channels=8,
        hidden_size=16,
        max_text_length=4,
    )
    model = trained_like(transformers.SLANetForTableRecognition(config), gain=1.5)
    return Client(model, 64, 96, main="last_hidden_state")


@client("UVDocModel")
def uv_doc() -> Client:
    backbone = {
        "model_type": "uvdoc_backbone",
        "resnet_head": [[3, 8], [8, 8]],
        "resnet_configs": [[[8, 8, 1, False]], [[8, 16, 1, True]], [[16, 16, 1, True]]],
        "stage_configs": [[[16, 1]], [[16, 2]]],
        "out_indices": [1, 2],
    }
    config = transformers.UVDocConfig(
        backbone_config=backbone, bridge_connector=[16, 16], out_point_positions2D=[[16, 8], [8, 2]]
    )
    model = trained_like(transformers.UVDocModel(config))
    return Client(model, 64, 96, main="last_hidden_state")


# ---- others ---------------------------------------------------------------------------------------------------------


def _vit_pose(**options: Any) -> Any:
    backbone = transformers.VitPoseBackboneConfig(
        **_VIT, image_size=(96, 64), patch_size=(16, 16), out_features=["stage2"], **options
    )
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=4)
    return trained_like(transformers.VitPoseForPoseEstimation(config))


@client("VitPoseForPoseEstimation")
def vit_pose() -> Client:
    return Client(_vit_pose(), 96, 64, main="heatmaps")


@client("VitPoseForPoseEstimation")
def vit_pose_plus() -> Client:
    """Mixture of experts: one of them is compiled."""
    arguments = {"dataset_index": torch.tensor([1, 1])}
    model = _vit_pose(num_experts=3, part_features=8)
    return Client(model, 96, 64, main="heatmaps", arguments=arguments, dataset_index=1)


@client("TvpForVideoGrounding")
def tvp() -> Client:
    """It takes one video at a time, of square frames."""
    config = transformers.TvpConfig(
        **_OWN_WEIGHTS,
        backbone_config=_resnet(out_features=["stage4"]),
        max_img_size=64,
        visual_prompt_size=8,
        num_frames=2,
        vocab_size=50,
        type_vocab_size=2,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        max_grid_col_position_embeddings=8,
        max_grid_row_position_embeddings=8,
    )
    model = trained_like(transformers.TvpForVideoGrounding(config), seed=1)
    text = torch.arange(6).reshape(1, 6)
    arguments = {"input_ids": text, "attention_mask": torch.ones_like(text), "output_hidden_states": True}
    return Client(model, 64, 64, batch=1, frames=2, arguments=arguments)
