# find_package(edge_backbones COMPONENTS OpenVINO) makes
#
#   edge_backbones::edge_backbones  the header-only core: bundles, checks, the choice of an engine. It runs no engine.
#   edge_backbones::openvino, ...   one target per component, which adds the library that runs engines.
#
# Components: each file in components/. Where to find this file: python -m edge_backbones --cmakedir
get_filename_component(_edge_backbones_cpp "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
get_filename_component(_edge_backbones_site "${_edge_backbones_cpp}/../.." ABSOLUTE)
set(edge_backbones_INCLUDE_DIR "${_edge_backbones_cpp}/include")
set(edge_backbones_VERIFY_SOURCE "${_edge_backbones_cpp}/tools/verify.cpp")

# The folders of Python packages in which libraries may lie: beside this package, and, where that is installed for
# development, in the environment that is active.
set(_edge_backbones_sites "${_edge_backbones_site}" ${edge_backbones_SITE_PACKAGES})
if(DEFINED ENV{VIRTUAL_ENV})
  file(GLOB _edge_backbones_env "$ENV{VIRTUAL_ENV}/lib/python3*/site-packages")
  list(APPEND _edge_backbones_sites ${_edge_backbones_env})
endif()

# Say why this package or a component of it cannot be used, once.
macro(_edge_backbones_fail reason)
  if(NOT edge_backbones_NOT_FOUND_MESSAGE)
    set(edge_backbones_NOT_FOUND_MESSAGE "${reason}")
  endif()
  if(NOT edge_backbones_FIND_QUIETLY)
    message(STATUS "edge_backbones: ${reason}")
  endif()
endmacro()

if(NOT TARGET edge_backbones::edge_backbones)
  set(_edge_backbones_json "")
  if(NOT TARGET nlohmann_json::nlohmann_json)
    find_package(nlohmann_json 3.9 QUIET)
  endif()
  if(TARGET nlohmann_json::nlohmann_json)
    set(_edge_backbones_json found)
  else()
    foreach(_edge_backbones_folder IN LISTS _edge_backbones_sites)
      if(NOT _edge_backbones_json AND EXISTS "${_edge_backbones_folder}/nlohmann_json/include/nlohmann/json.hpp")
        set(_edge_backbones_json "${_edge_backbones_folder}/nlohmann_json/include")
      endif()
    endforeach()
  endif()
  if(_edge_backbones_json)
    add_library(edge_backbones::edge_backbones INTERFACE IMPORTED)
    target_include_directories(edge_backbones::edge_backbones INTERFACE "${edge_backbones_INCLUDE_DIR}")
    target_compile_features(edge_backbones::edge_backbones INTERFACE cxx_std_17)
    find_package(Threads QUIET)
    if(TARGET Threads::Threads)
      target_link_libraries(edge_backbones::edge_backbones INTERFACE Threads::Threads)
    endif()
    target_link_libraries(edge_backbones::edge_backbones INTERFACE ${CMAKE_DL_LIBS})
    if(TARGET nlohmann_json::nlohmann_json)
      target_link_libraries(edge_backbones::edge_backbones INTERFACE nlohmann_json::nlohmann_json)
    else()
      target_include_directories(edge_backbones::edge_backbones SYSTEM INTERFACE "${_edge_backbones_json}")
    endif()
  endif()
endif()

set(edge_backbones_FOUND TRUE)
if(NOT TARGET edge_backbones::edge_backbones)
  set(edge_backbones_FOUND FALSE)
  _edge_backbones_fail("nlohmann/json.hpp is missing: pip install 'edge-backbones[cpp]' into the environment of edge-backbones, \
or apt-get install nlohmann-json3-dev")
endif()

# A component's file makes its target and sets edge_backbones_<component>_FOUND, or edge_backbones_<component>_REASON.
foreach(_edge_backbones_component IN LISTS edge_backbones_FIND_COMPONENTS)
  set(edge_backbones_${_edge_backbones_component}_FOUND FALSE)
  set(edge_backbones_${_edge_backbones_component}_REASON "")
  string(TOLOWER "${_edge_backbones_component}" _edge_backbones_file)
  set(_edge_backbones_file "${CMAKE_CURRENT_LIST_DIR}/components/${_edge_backbones_file}.cmake")
  if(NOT TARGET edge_backbones::edge_backbones)
    continue()
  elseif(EXISTS "${_edge_backbones_file}")
    include("${_edge_backbones_file}")
  else()
    file(GLOB _edge_backbones_known RELATIVE "${CMAKE_CURRENT_LIST_DIR}/components" "${CMAKE_CURRENT_LIST_DIR}/components/*.cmake")
    set(edge_backbones_${_edge_backbones_component}_REASON
        "there is no component ${_edge_backbones_component}: choose among ${_edge_backbones_known}, without .cmake")
  endif()
  if(NOT edge_backbones_${_edge_backbones_component}_FOUND)
    if(edge_backbones_FIND_REQUIRED_${_edge_backbones_component})
      set(edge_backbones_FOUND FALSE)
    endif()
    _edge_backbones_fail("${edge_backbones_${_edge_backbones_component}_REASON}")
  endif()
endforeach()
