# edge_backbones::tensorrt_rtx: runs plans of TensorRT-RTX.
#
# Headers and library come from NVIDIA's archive of TensorRT-RTX (TensorRT_RTX_ROOT); the library also from its Python package.
# A program has TensorRT or TensorRT-RTX: both have the same names.
include("${CMAKE_CURRENT_LIST_DIR}/../cuda_runtime.cmake")
_edge_backbones_find_nvidia(TensorRT_RTX tensorrt_rtx tensorrt_rtx_libs "1")
if(_edge_backbones_lacks)
  set(edge_backbones_TensorRT_RTX_REASON "TensorRT-RTX cannot be used, ${_edge_backbones_lacks}: unpack NVIDIA's archive of \
TensorRT-RTX and set TensorRT_RTX_ROOT to it, and CUDA_ROOT to the CUDA toolkit")
else()
  set(edge_backbones_TensorRT_RTX_FOUND TRUE)
  if(NOT TARGET edge_backbones::tensorrt_rtx)
    _edge_backbones_add_nvidia(tensorrt_rtx TensorRT_RTX)
    target_compile_definitions(edge_backbones::tensorrt_rtx INTERFACE EDGE_BACKBONES_WITH_TENSORRT_RTX)
  endif()
endif()
