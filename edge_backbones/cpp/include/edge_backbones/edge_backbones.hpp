// Read and run the bundles of edge-backbones: one include for everything.
#pragma once

#include "back_ends.hpp"
#include "backbone.hpp"
#include "compat.hpp"
#include "cpus.hpp"
#include "errors.hpp"
#include "feature_maps.hpp"
#include "golden.hpp"
#include "host.hpp"
#include "manifest.hpp"
#include "manifest_json.hpp"
#include "parity.hpp"
#include "promises.hpp"
#include "select.hpp"
#include "session.hpp"
#include "trust.hpp"
#include "types.hpp"
