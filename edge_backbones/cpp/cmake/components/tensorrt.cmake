# edge_backbones::tensorrt: runs plans of TensorRT 10.3 or newer. With TensorRT_LEAN set, those that its lean runtime runs.
#
# Headers and library come from the system (JetPack, NVIDIA's apt packages), or from TensorRT_ROOT and CUDA_ROOT. NVIDIA's Python
# packages have the libraries and not the headers of TensorRT.
include("${CMAKE_CURRENT_LIST_DIR}/../cuda_runtime.cmake")
if(TensorRT_LEAN)
  set(_edge_backbones_library nvinfer_lean)
  set(_edge_backbones_packages tensorrt_lean_libs)
else()
  set(_edge_backbones_library nvinfer)
  set(_edge_backbones_packages tensorrt_libs)
endif()
_edge_backbones_find_nvidia(TensorRT ${_edge_backbones_library} "${_edge_backbones_packages}" "10;11")
if(_edge_backbones_lacks)
  set(edge_backbones_TensorRT_REASON "TensorRT cannot be used, ${_edge_backbones_lacks}: apt-get install libnvinfer-headers-dev \
libnvinfer-dev cuda-cudart-dev-12-6 from NVIDIA's repository (JetPack has them), or set TensorRT_ROOT and CUDA_ROOT")
else()
  set(edge_backbones_TensorRT_FOUND TRUE)
  if(NOT TARGET edge_backbones::tensorrt)
    _edge_backbones_add_nvidia(tensorrt TensorRT)
    target_compile_definitions(edge_backbones::tensorrt INTERFACE EDGE_BACKBONES_WITH_TENSORRT
      $<$<BOOL:${TensorRT_LEAN}>:EDGE_BACKBONES_WITH_TENSORRT_LEAN>)
  endif()
endif()
