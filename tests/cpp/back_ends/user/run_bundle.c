/* Runs a bundle on zeros and prints the shapes of its feature maps: the least that a program in C99 does. */
#include <edge_backbones/edge_backbones.h>
#include <stdio.h>
#include <stdlib.h>

static int failed(int32_t code) {
  fprintf(stderr, "%s: %s\n", eb_code_name(code), eb_last_error());
  return 1;
}

int main(int count, char **arguments) {
  eb_options options = {.size = sizeof options};
  eb_input_info input = {.size = sizeof input};
  eb_backbone backbone = 0;
  size_t outputs = 0, bytes = 4, i;
  int32_t code, axis;

  if (count != 2) {
    fprintf(stderr, "usage: run_bundle BUNDLE\n");
    return 2;
  }
  options.device = "cpu";
  if ((code = eb_open(arguments[1], &options, &backbone)) != EB_OK) return failed(code);
  if ((code = eb_input(backbone, &input)) != EB_OK) return failed(code);
  if ((code = eb_output_count(backbone, &outputs, NULL)) != EB_OK) return failed(code);
  for (axis = 0; axis < input.axes; ++axis) bytes *= (size_t)input.opt_shape[axis];
  {
    void *const pixels = calloc(1, bytes);
    void **const maps = calloc(outputs, sizeof *maps);
    size_t *const sizes = calloc(outputs, sizeof *sizes);
    if (pixels == NULL || maps == NULL || sizes == NULL) return 1;
    for (i = 0; i < outputs; ++i) {
      eb_output_info output = {.size = sizeof output};
      if ((code = eb_output(backbone, i, NULL, 0, &output)) != EB_OK) return failed(code);
      sizes[i] = output.bytes;
      maps[i] = malloc(output.bytes);
      printf("%s (%ld, %ld, %ld, %ld) %s, stride %ld\n", output.name, (long)output.shape[0], (long)output.shape[1],
             (long)output.shape[2], (long)output.shape[3], output.layout, (long)output.stride[0]);
    }
    code = eb_run(backbone, pixels, bytes, input.opt_shape, (size_t)input.axes, maps, sizes, outputs);
    if (code != EB_OK) return failed(code);
    for (i = 0; i < outputs; ++i) free(maps[i]);
    free(maps);
    free(sizes);
    free(pixels);
  }
  return eb_close(backbone) == EB_OK ? 0 : 1;
}
