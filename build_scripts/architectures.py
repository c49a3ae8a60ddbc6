"""One small network of every kind of backbone: what the coverage sweep builds.

transformers: every architecture of ``AutoBackbone`` that needs no further library (dinat needs natten), with random
weights, at least two blocks per stage, channels that int8 has something to do with, and the parts that its published
checkpoints use (relative positions, layer scale, grouped queries). Sizes are not square wherever the architecture lets
them be. timm: for every pair of module and class of feature extractor, the name with the fewest parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LAST_SEEN = {"timm": "1.0.31", "transformers": "5.23.0"}
"""The releases that the tables were made for; newer ones may have more."""

NEEDS_MORE = frozenset({"dinat", "nat"})
"""Backbones of transformers that need a library which builds for few platforms (natten)."""


@dataclass(frozen=True)
class Architecture:
    """Arguments of a configuration, and the image size to build it at."""

    height: int
    width: int
    arguments: Mapping[str, Any]


_CNN: dict[str, Any] = {"hidden_sizes": [64, 96, 128, 192], "depths": [2, 2, 2, 2], "out_indices": [1, 2, 3, 4]}
_BOTTLENECKS: dict[str, Any] = {**_CNN, "embedding_size": 32, "hidden_sizes": [128, 192, 256, 384]}
_VIT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "initializer_range": 0.1,  # at the usual 0.02 layers this narrow add next to nothing to the residual stream
    "out_indices": [1, 2, 3, 4],
}
_SWIN: dict[str, Any] = {
    "image_size": (128, 160),
    "embed_dim": 32,
    "depths": [2, 2, 2, 2],
    "num_heads": [1, 2, 4, 8],
    "initializer_range": 0.1,
    "window_size": 4,  # 5 cells across in the last stage: the maps are padded to whole windows
    "out_indices": [1, 2, 3, 4],
}
_TIPSV2: dict[str, Any] = {**_VIT, "image_size": 56, "patch_size": 14}

TRANSFORMERS: dict[str, Architecture] = {
    "beit": Architecture(
        64,
        96,
        {
            **_VIT,
            "intermediate_size": 128,
            "image_size": (64, 96),
            "layer_scale_init_value": 1.0,
            "use_relative_position_bias": True,
        },
    ),
    "bit": Architecture(96, 128, {**_BOTTLENECKS, "num_groups": 16}),
    "convnext": Architecture(96, 128, _CNN),
    "convnextv2": Architecture(96, 128, _CNN),
    "dinov2": Architecture(56, 84, {**_VIT, "image_size": 56, "patch_size": 14}),
    "dinov2_with_registers": Architecture(64, 96, {**_VIT, "image_size": 64}),
    "dinov3_convnext": Architecture(96, 128, _CNN),
    "dinov3_vit": Architecture(
        64, 96, {**_VIT, "intermediate_size": 128, "num_register_tokens": 4, "use_gated_mlp": True}
    ),
    "focalnet": Architecture(
        96,
        128,
        {
            "embed_dim": 32,
            "hidden_sizes": [64, 128, 256, 256],
            "depths": [2, 2, 2, 2],
            "use_layerscale": True,
            "out_indices": [1, 2, 3, 4],
        },
    ),
    "hgnet_v2": Architecture(
        96,
        128,
        {
            "stem_channels": [3, 16, 32],
            "stage_in_channels": [32, 64, 128, 256],
            "stage_mid_channels": [32, 32, 64, 64],
            "stage_out_channels": [64, 128, 256, 512],
            "stage_num_blocks": [1, 1, 2, 1],
            "stage_numb_of_layers": [3, 3, 3, 3],
            "use_learnable_affine_block": True,
            "out_indices": [1, 2, 3, 4],
        },
    ),
    "hiera": Architecture(
        96,
        128,
        {
            "image_size": [96, 128],
            "embed_dim": 32,
            "depths": [2, 2, 2, 2],
            "num_heads": [1, 2, 4, 8],
            "out_indices": [1, 2, 3, 4],
        },
    ),
    "lw_detr_vit": Architecture(
        64, 96, {**_VIT, "image_size": 64, "pretrain_image_size": 48, "num_windows": 4, "window_block_indices": [0, 2]}
    ),
    "maskformer-swin": Architecture(128, 160, _SWIN),
    "pixio": Architecture(64, 96, {**_VIT, "image_size": 64}),
    "pp_lcnet": Architecture(96, 128, {"out_indices": [2, 3, 4, 5]}),
    "pp_lcnet_v3": Architecture(96, 128, {"out_indices": [2, 3, 4, 5]}),
    "pp_lcnet_v4": Architecture(96, 128, {"out_indices": [1, 2, 3, 4]}),
    "pvt_v2": Architecture(96, 128, {"image_size": (96, 128), "out_indices": [0, 1, 2, 3]}),
    "resnet": Architecture(96, 128, _BOTTLENECKS),
    "rf_detr_dinov2": Architecture(
        56, 84, {**_VIT, "image_size": 56, "num_windows": 2, "window_block_indexes": [0, 2]}
    ),
    "rt_detr_resnet": Architecture(96, 128, _BOTTLENECKS),
    "sapiens2": Architecture(
        64,
        96,
        {
            **_VIT,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "image_size": (64, 96),
            "num_key_value_heads_per_layer": [4, 2, 2, 4],
        },
    ),
    "swin": Architecture(128, 160, _SWIN),
    "swinv2": Architecture(128, 160, _SWIN),
    "textnet": Architecture(96, 128, {"out_indices": [1, 2, 3, 4]}),
    "timm_backbone": Architecture(96, 128, {"backbone": "resnet10t", "out_indices": [1, 2, 3, 4]}),
    "tipsv2": Architecture(
        56, 84, {"vision_config": _TIPSV2, "text_config": {"hidden_size": 64, "num_attention_heads": 2}}
    ),
    "tipsv2_vision_model": Architecture(56, 84, _TIPSV2),
    "uvdoc_backbone": Architecture(96, 128, {"out_indices": [1, 3, 6]}),
    "vitdet": Architecture(
        64,
        96,
        {
            **_VIT,
            "image_size": 64,
            "pretrain_image_size": 48,
            "window_size": 3,
            "window_block_indices": [0, 2],
            "residual_block_indices": [1],
            "use_relative_position_embeddings": True,
        },
    ),
    "vitpose_backbone": Architecture(96, 64, {**_VIT, "image_size": (96, 64)}),
}


# name: (module of timm, class of its feature extractor)
TIMM: dict[str, tuple[str, str]] = {
    "beit_base_patch16_224": ("beit", "FeatureGetterNet"),
    "halonet_h1": ("byoanet", "FeatureListNet"),
    "mobileone_s1": ("byobnet", "FeatureListNet"),
    "cait_xxs24_224": ("cait", "FeatureGetterNet"),
    "coat_tiny": ("coat", "FeatureGetterNet"),
    "convit_tiny": ("convit", "FeatureGetterNet"),
    "convmixer_768_32": ("convmixer", "FeatureGetterNet"),
    "convnext_zepto_rms": ("convnext", "FeatureListNet"),
    "cpubone_nano": ("cpubone", "FeatureListNet"),
    "crossvit_tiny_240": ("crossvit", "FeatureGetterNet"),
    "csatv2": ("csatv2", "FeatureListNet"),
    "cs3darknet_focus_s": ("cspnet", "FeatureListNet"),
    "cspnext_tiny": ("cspnext", "FeatureGetterNet"),
    "davit_tiny": ("davit", "FeatureListNet"),
    "deepseek_vit_412m": ("deepseek_vit", "FeatureGetterNet"),
    "deit_tiny_patch16_224": ("deit", "FeatureGetterNet"),
    "densenet121": ("densenet", "FeatureListNet"),
    "dla46x_c": ("dla", "FeatureListNet"),
    "dpn48b": ("dpn", "FeatureListNet"),
    "edgenext_xx_small": ("edgenext", "FeatureListNet"),
    "efficientformer_l1": ("efficientformer", "FeatureGetterNet"),
    "efficientformerv2_s0": ("efficientformer_v2", "FeatureListNet"),
    "mobilenetv2_035": ("efficientnet", "EfficientNetFeatures"),
    "efficientvim_m1": ("efficientvim", "FeatureGetterNet"),
    "efficientvit_b0": ("efficientvit_mit", "FeatureListNet"),
    "efficientvit_m0": ("efficientvit_msra", "FeatureListNet"),
    "vit_tiny_patch16_dinov3_qkvb": ("eva", "FeatureGetterNet"),
    "fasternet_t0": ("fasternet", "FeatureListNet"),
    "fastvit_t8": ("fastvit", "FeatureListNet"),
    "focalnet_tiny_srf": ("focalnet", "FeatureListNet"),
    "gcvit_xxtiny": ("gcvit", "FeatureListNet"),
    "gemma4_vit_167m": ("gemma4_vit", "FeatureGetterNet"),
    "ghostnet_050": ("ghostnet", "FeatureListNet"),
    "hardcorenas_b": ("hardcorenas", "MobileNetV3Features"),
    "hgnetv2_b0": ("hgnet", "FeatureListNet"),
    "hiera_tiny_224": ("hiera", "FeatureGetterNet"),
    "sam2_hiera_tiny": ("hieradet_sam2", "FeatureGetterNet"),
    "hrnet_w18_small": ("hrnet", "HighResolutionNetFeatures"),
    "iformer_t": ("iformer", "FeatureListNet"),
    "inception_next_atto": ("inception_next", "FeatureListNet"),
    "inception_resnet_v2": ("inception_resnet_v2", "FeatureListNet"),
    "inception_v3": ("inception_v3", "FeatureListNet"),
    "inception_v4": ("inception_v4", "FeatureListNet"),
    "lcnetv2_small": ("lcnetv2", "FeatureListNet"),
    "levit_128s": ("levit", "FeatureGetterNet"),
    "levit_conv_128s": ("levit", "FeatureListNet"),
    "lowformer_b0": ("lowformer", "FeatureListNet"),
    "mambaout_femto": ("mambaout", "FeatureListNet"),
    "maxvit_pico_rw_256": ("maxxvit", "FeatureListNet"),
    "poolformerv2_s12": ("metaformer", "FeatureListNet"),
    "gmlp_ti16_224": ("mlp_mixer", "FeatureGetterNet"),
    "lcnet_035": ("mobilenetv3", "MobileNetV3Features"),
    "mobilenetv5_base": ("mobilenetv5", "FeatureGetterNet"),
    "mobilevit_xxs": ("mobilevit", "FeatureListNet"),
    "mvitv2_tiny": ("mvitv2", "FeatureGetterNet"),
    "naflexvit_base_patch16_parfac_gap": ("naflexvit", "FeatureGetterNet"),
    "nasnetalarge": ("nasnet", "FeatureHookNet"),
    "nest_tiny": ("nest", "FeatureListNet"),
    "nextvit_small": ("nextvit", "FeatureListNet"),
    "nf_regnet_b0": ("nfnet", "FeatureListNet"),
    "pit_ti_224": ("pit", "FeatureHookNet"),
    "pnasnet5large": ("pnasnet", "FeatureHookNet"),
    "pvt_v2_b0": ("pvt_v2", "FeatureListNet"),
    "qwen3_vit_88m": ("qwen3_vit", "FeatureGetterNet"),
    "rdnet_tiny": ("rdnet", "FeatureListNet"),
    "regnetx_002": ("regnet", "FeatureListNet"),
    "repghostnet_050": ("repghost", "FeatureListNet"),
    "repvit_m1": ("repvit", "FeatureListNet"),
    "res2next50": ("res2net", "FeatureListNet"),
    "resnest14d": ("resnest", "FeatureListNet"),
    "resnet10t": ("resnet", "FeatureListNet"),
    "resnetv2_18": ("resnetv2", "FeatureListNet"),
    "rexnet_100": ("rexnet", "FeatureListNet"),
    "selecsls42": ("selecsls", "FeatureListNet"),
    "legacy_seresnet18": ("senet", "FeatureListNet"),
    "sequencer2d_s": ("sequencer", "FeatureListNet"),
    "shvit_s1": ("shvit", "FeatureListNet"),
    "skresnet18": ("sknet", "FeatureListNet"),
    "starnet_s050": ("starnet", "FeatureListNet"),
    "swiftformer_xs": ("swiftformer", "FeatureListNet"),
    "swin_tiny_patch4_window7_224": ("swin_transformer", "FeatureListNet"),
    "swinv2_tiny_window16_256": ("swin_transformer_v2", "FeatureListNet"),
    "swinv2_cr_tiny_224": ("swin_transformer_v2_cr", "FeatureListNet"),
    "tiny_vit_5m_224": ("tiny_vit", "FeatureListNet"),
    "tnt_s_legacy_patch16_224": ("tnt", "FeatureGetterNet"),
    "tresnet_m": ("tresnet", "FeatureListNet"),
    "twins_svt_small": ("twins", "FeatureGetterNet"),
    "vgg11": ("vgg", "FeatureListNet"),
    "visformer_tiny": ("visformer", "FeatureGetterNet"),
    "vit_tiny_patch16_224": ("vision_transformer", "FeatureGetterNet"),
    "vit_tiny_r_s16_p8_224": ("vision_transformer_hybrid", "FeatureGetterNet"),
    "vit_srelpos_small_patch16_224": ("vision_transformer_relpos", "FeatureGetterNet"),
    "samvit_base_patch16_224": ("vision_transformer_sam", "FeatureGetterNet"),
    "vitamin_small_224": ("vitamin", "FeatureGetterNet"),
    "volo_d1_224": ("volo", "FeatureGetterNet"),
    "ese_vovnet19b_slim_dw": ("vovnet", "FeatureListNet"),
    "legacy_xception": ("xception", "FeatureHookNet"),
    "xception41p": ("xception_aligned", "FeatureHookNet"),
    "xcit_nano_12_p8_224": ("xcit", "FeatureGetterNet"),
}


def transformers_config(name: str) -> Any:
    """Return the small configuration of an architecture. Raises KeyError if this transformers lacks it."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[name](**TRANSFORMERS[name].arguments)


def cheapest_of_timm() -> dict[tuple[str, str], str]:
    """Compute TIMM for the installed release, by (module, class). Takes minutes: it creates every network."""
    import timm
    import torch

    cheapest: dict[tuple[str, str], tuple[int, str]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            if name.startswith("test_"):  # toys for timm's own tests
                continue
            with torch.device("meta"):
                net = timm.create_model(name, features_only=True)
            size = sum(parameter.numel() for parameter in net.parameters())
            pair = (module, type(net).__name__)
            cheapest[pair] = min(cheapest.get(pair, (size, name)), (size, name))
    return {pair: name for pair, (_, name) in cheapest.items()}
