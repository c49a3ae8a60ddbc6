// How much the scene in front of a camera has changed, frame by frame, in C++.
//
//   edge-backbones build resnet18 camera.bundle --images photographs/ --input frame --frame 480x640 --color yuyv
//   ffmpeg -f v4l2 -video_size 640x480 -i /dev/video0 -pix_fmt yuyv422 -f rawvideo - | camera camera.bundle
//
// Needs a bundle that takes a camera's frames (--input frame). Its graph converts, crops, resizes and normalises as the
// network was trained, bit for bit. A bundle that takes pixel_values leaves this to the program, and a resize of one's own is
// not the one of the training: such bundles are refused here. In Python, EdgeBackbone.preprocess does it.
#include <cmath>
#include <cstdio>
#include <edge_backbones/edge_backbones.hpp>
#include <string>
#include <vector>

namespace eb = edge_backbones;

namespace {

/// Return the mean of every channel of a map in any layout: one vector that says what is in the picture.
std::vector<double> channel_means(const eb::FeatureMap& map, const eb::OutputSpec& output) {
  const std::size_t axis = output.layout.find('C');
  std::vector<double> means(static_cast<std::size_t>(map.shape[axis]), 0.0);
  std::size_t inner = 1;
  for (std::size_t i = axis + 1; i < map.shape.size(); ++i) inner *= static_cast<std::size_t>(map.shape[i]);
  const std::size_t count = eb::size_of(map.shape);
  for (std::size_t i = 0; i < count; ++i) means[i / inner % means.size()] += map.data<float>()[i];
  for (double& mean : means) mean *= static_cast<double>(means.size()) / static_cast<double>(count);
  return means;
}

/// Return 1 - cosine of two vectors: 0 for the same scene.
double change(const std::vector<double>& a, const std::vector<double>& b) {
  double product = 0, of_a = 0, of_b = 0;
  for (std::size_t i = 0; i < a.size(); ++i) product += a[i] * b[i], of_a += a[i] * a[i], of_b += b[i] * b[i];
  return 1 - product / std::sqrt(of_a * of_b);
}

int run(const std::string& path) {
  eb::Backbone backbone = eb::Backbone::from_pretrained(path);
  if (!backbone.input().frame) {
    std::fprintf(stderr, "%s takes %s: build one that takes frames (--input frame --frame HEIGHTxWIDTH --color yuyv)\n",
                 path.c_str(), backbone.input().name.c_str());
    return 1;
  }
  const eb::BackboneSpec& spec = backbone.manifest().backbone;
  if (spec.map_dtype != eb::DType::float32 || spec.channels_last) {
    std::fprintf(stderr, "%s returns other maps than this program reads: build it without --maps\n", path.c_str());
    return 1;
  }
  std::fprintf(stderr, "reading %s from standard input; engine %s\n", backbone.input().frame->str().c_str(),
               backbone.engine_name().c_str());
  const eb::OutputSpec last = spec.described_outputs()[backbone.out_features().size() - 1];
  eb::Shape shape = backbone.opt_shape();
  shape[0] = 1;
  std::vector<std::uint8_t> frame(eb::size_of(shape));
  std::vector<double> first;
  for (long number = 0; std::fread(frame.data(), 1, frame.size(), stdin) == frame.size(); ++number) {
    const eb::FeatureMaps maps = backbone(eb::ConstTensor::of(frame.data(), shape));
    const std::vector<double> now = channel_means(maps[last.name], last);
    if (first.empty()) first = now;
    std::printf("frame %ld: changed by %.4f\n", number, change(first, now));
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fputs("usage: camera BUNDLE < frames\n", stderr);
    return 2;
  }
  try {
    return run(arguments[1]);
  } catch (const eb::Error& error) {
    std::fprintf(stderr, "%s: %s\n", eb::name_of(error.code()), error.what());
    return 1;
  }
}
