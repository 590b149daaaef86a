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

}  // namespace

void linear(int dtype, const LinearParams& params, bool overlap, void* stream) {
    static_assert(LinearTile<2>::kXRows == kMaxLinearRows);
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        if (params.num_rows <= LinearTile<1>::kXRows) {
            launch_linear<T, 1>(params, overlap, stream);
        } else {
            launch_linear<T, 2>(params, overlap, stream);
        }
    });
}

}  // namespace keye
