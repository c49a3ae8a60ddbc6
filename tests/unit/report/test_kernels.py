"""What a plan spends kernels on, counted from layers as TensorRT 10 and TensorRT 11 describe them."""

from __future__ import annotations

import pytest

from edge_backbones.report.kernels import KernelCounts, count_kernels


def layer(name: str, kind: str, tactic: str = "", output: str = "Half") -> dict:
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": "x", "Dimensions": [1, 197, 384], "Format/Datatype": "Half"}],
        "Outputs": [{"Name": "y", "Dimensions": [1, 197, 384], "Format/Datatype": output}],
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": f"[ONNX Layer: {name}]",
    }


REFORMAT = layer("Reformatting CopyNode for Input Tensor 0 to patch_embed/Conv", "Reformat")
PATCHES = layer("patch_embed/Conv", "CaskConvolution", "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc")
NORM = layer("__myl_CastMeanSubMulMeanAddSqrtDivMulCastMulAdd_myl0_1", "kgen", "__myl_CastMeanSubMulMeanAddSqrt_0x1a2b")
QKV = layer("blocks.0.mha/qkv/MatMul_myl0_2", "gemm", "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize128x64x64")
MOVE = layer("__myl_ReshTranMove_myl0_3", "kgen", "__myl_ReshTranMove_0x77aa")
CAST = layer("__myl_Cast_myl0_4", "kgen", "__myl_Cast_0x0b", "Float")
FUSED = layer("_gemm_mha_v2_myl0_5", "kgen", "_gemm_mha_v2_0x957a2fe283f77dcf35c142c1390a3e6a")
SOFTMAX = layer("__myl_CastMaxrSubExpSumDivMulCast_myl0_6", "kgen", "__myl_CastMaxrSubExpSumDivMul_0x33")


def test_a_vision_transformer_with_fused_attention():
    layers = [REFORMAT, PATCHES, *[NORM, QKV, MOVE, FUSED] * 12, CAST]
    assert count_kernels(layers) == KernelCounts(kernels=51, attention=12, casts=1, copies=13)
    assert str(count_kernels(layers)) == "51 kernels: 12 fused attention, 1 cast, 13 reformats and copies"


def test_a_vision_transformer_whose_attention_stayed_in_pieces():
    """Modules that are called mha, as those of MultiheadAttention are, make no kernel one of attention."""
    layers = [PATCHES, *[NORM, QKV, CAST, QKV, SOFTMAX, CAST, QKV] * 2]
    assert count_kernels(layers) == KernelCounts(kernels=15, attention=0, casts=4, copies=0)
    assert str(count_kernels(layers)) == "15 kernels: no fused attention, 4 casts, no reformats and copies"


@pytest.mark.parametrize(
    ("described", "kind"),
    [
        (layer("/attn/MatMul", "mha", "fmha_v2_flash_attention_fp16_64_64_S_64_sm86_kernel"), "attention"),
        (layer("/attn", "kgen", "sm90_fmha_fp16"), "attention"),
        (layer("_gemv_mha_v1_myl3_6", "kgen"), "attention"),
        (layer("__mye8037_gemm_mha_v2", "kgen"), "attention"),
        ("_gemm_mha_v2_myl3_6", "attention"),  # without details a layer is its name
        (layer("alphabet/MatMul", "gemm", "sm80_xmma_gemm_alpha"), "other"),
        (layer("encoder.mha.out_proj/MatMul", "gemm", "sm80_xmma_gemm_f16"), "other"),
        ("encoder_mha_out_proj/MatMul", "other"),
        (layer("cast_12", "Cast"), "casts"),
        (layer("__myl_Cas_myl0_1", "kgen"), "casts"),
        (layer("__myl_ReshCastTran_myl0_1", "kgen"), "casts"),
        (layer("__myl_bb1_4_Tra", "kgen", "__myl_bb1_4_Tra"), "copies"),
        (layer("__myl_TraSliSliRes_myl0_1", "kgen"), "copies"),
        (layer("__myl_CastMul_myl0_1", "kgen"), "other"),  # the cast is inside
        ("Reformatting CopyNode for Output Tensor 0 to conv", "copies"),
        (layer("Reformatting CopyNode for Input Tensor 1 to Conv_5", "NoOp"), "idle"),
        (layer("__mye6916", "wait"), "idle"),
        (layer("__mye6918", "signal"), "idle"),
        (layer("w", "Constant"), "idle"),
        ({}, "other"),
        ({"Name": None, "LayerType": 3, "TacticName": ["x"]}, "other"),
        (None, "other"),
    ],
)
def test_kinds_of_layers(described, kind):
    counts = count_kernels([described])
    assert counts.kernels == (kind != "idle")
    assert {name for name in ("attention", "casts", "copies") if getattr(counts, name)} == {kind} - {"other", "idle"}


def test_no_layers():
    assert str(count_kernels([])) == "no kernels: no fused attention, no casts, no reformats and copies"
