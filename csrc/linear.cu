#include "keye/linear.cuh"

#include "keye/launch.cuh"

namespace keye {
namespace {

template <class T, int kTiles>
void launch_linear(const LinearParams& params, bool overlap, void* stream) {
    using Tile = LinearTile<kTiles>;
    const int channels = params.swiglu ? Tile::kHalf : Tile::kRows;
    const int tiles = (params.width - 1) / channels + 1;
    const unsigned num_blocks = static_cast<unsigned>(tiles) * params.num_splits;
    launch<linear_kernel<T, kTiles>>("linear", {num_blocks, Tile::kThreads, Tile::kSharedBytes},
                                     overlap, stream, params);
}

template <class T>
void launch_by_rows(const LinearParams& params, bool overlap, void* stream) {
    if (params.num_rows <= 8) {
        launch_linear<T, 1>(params, overlap, stream);
    } else {
        launch_linear<T, 2>(params, overlap, stream);
    }
}

}  // namespace

void linear(int dtype, const LinearParams& params, bool overlap, void* stream) {
    if (static_cast<Dtype>(dtype) == Dtype::kBf16) {
        launch_by_rows<bf16>(params, overlap, stream);
    } else {
        launch_by_rows<fp16>(params, overlap, stream);
    }
}

}  // namespace keye
