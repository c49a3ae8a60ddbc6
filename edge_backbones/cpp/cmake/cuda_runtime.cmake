# How the components for NVIDIA's GPUs find headers and libraries. Not with find_package(CUDAToolkit): it asks for nvcc.
include_guard(GLOBAL)

# Set _edge_backbones_lacks to what cannot be found for a component; "" if everything is there. Caches <component>_INCLUDE_DIR and
# <component>_LIBRARY, CUDA_RUNTIME_INCLUDE_DIR and CUDA_RUNTIME_LIBRARY.
#
# library: its name. packages: folders in site-packages that may hold it. releases: the numbers that its file may end in.
function(_edge_backbones_find_nvidia component library packages releases)
  set(names ${library})
  foreach(release IN LISTS releases)
    list(APPEND names lib${library}.so.${release})
  endforeach()
  set(cuda_folders "")
  set(folders "")
  foreach(site IN LISTS _edge_backbones_sites)
    foreach(package IN LISTS packages)
      list(APPEND folders "${site}/${package}")
    endforeach()
    list(APPEND cuda_folders "${site}/nvidia/cu13" "${site}/nvidia/cuda_runtime")
  endforeach()
  set(places include lib lib64 lib/stubs targets/x86_64-linux/include targets/x86_64-linux/lib targets/aarch64-linux/include
    targets/aarch64-linux/lib)
  find_path(${component}_INCLUDE_DIR NvInferRuntime.h HINTS "${${component}_ROOT}" "$ENV{${component}_ROOT}" PATH_SUFFIXES ${places})
  find_library(${component}_LIBRARY NAMES ${names} HINTS "${${component}_ROOT}" "$ENV{${component}_ROOT}" ${folders}
    PATH_SUFFIXES ${places})
  find_path(CUDA_RUNTIME_INCLUDE_DIR cuda_runtime_api.h HINTS "${CUDA_ROOT}" "$ENV{CUDA_ROOT}" "$ENV{CUDA_PATH}"
    "${CUDAToolkit_ROOT}" PATHS /usr/local/cuda ${cuda_folders} PATH_SUFFIXES ${places})
  find_library(CUDA_RUNTIME_LIBRARY NAMES cudart libcudart.so.13 libcudart.so.12 HINTS "${CUDA_ROOT}" "$ENV{CUDA_ROOT}"
    "$ENV{CUDA_PATH}" "${CUDAToolkit_ROOT}" PATHS /usr/local/cuda ${cuda_folders} PATH_SUFFIXES ${places})
  set(lacks "")
  if(NOT ${component}_INCLUDE_DIR)
    list(APPEND lacks NvInferRuntime.h)
  endif()
  if(NOT ${component}_LIBRARY)
    list(APPEND lacks lib${library}.so)
  endif()
  if(NOT CUDA_RUNTIME_INCLUDE_DIR)
    list(APPEND lacks cuda_runtime_api.h)
  endif()
  if(NOT CUDA_RUNTIME_LIBRARY)
    list(APPEND lacks libcudart.so)
  endif()
  if(lacks)
    string(REPLACE ";" ", " lacks "${lacks}")
    set(lacks "${lacks} cannot be found")
  endif()
  set(_edge_backbones_lacks "${lacks}" PARENT_SCOPE)
endfunction()

# Make the target of a component whose headers and libraries were found.
function(_edge_backbones_add_nvidia target component)
  add_library(edge_backbones::${target} INTERFACE IMPORTED)
  target_include_directories(edge_backbones::${target} SYSTEM INTERFACE "${${component}_INCLUDE_DIR}" "${CUDA_RUNTIME_INCLUDE_DIR}")
  target_link_libraries(edge_backbones::${target} INTERFACE edge_backbones::edge_backbones "${${component}_LIBRARY}"
    "${CUDA_RUNTIME_LIBRARY}")
endfunction()
