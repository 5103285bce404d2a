// The graph itself: rows T(p, .) for a list of pixels, and the gradient of the image from the gradient of the rows.
#include "ssg_rows.cuh"

// One block, one row.
extern "C" __global__ void __launch_bounds__(SSG_THREADS, SSG_MIN_BLOCKS)
ssg_graph(
    const float* __restrict__ image,            // [B, C, H, W]
    const long long* __restrict__ pixels,       // [N]: (b H + y) W + x
    int channels, int height, int width,
    float inverse_kappa, int normalize,
    float* rows                                 // [N, search^2]
) {
    Shared& s = *reinterpret_cast<Shared*>(shared_memory);
    const long long pixel = pixels[blockIdx.x];
    const int x = (int)(pixel % width), y = (int)(pixel / width % height);
    image += pixel / width / height * channels * (size_t)height * width;
    clear_shared(s);

    float dist[kRounds][kRun], row_sum[1] = {0.f};
    row_distances(s, image, channels, height, width, y, x, dist);
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
#pragma unroll
        for (int v = 0; v < kRun; ++v) {
            const int item = threadIdx.x + round * kThreads;
            if (!is_offset(item, v)) continue;
            const float similarity = expf(-(dist[round][v] * inverse_kappa));
            s.slope[(run_line(item) + kHalf) * kStride + run_start(item) + v + kHalf] = similarity;
            row_sum[0] += similarity;
        }
    block_sum(s, row_sum);
    const float scale = normalize ? (float)(1. / (s.total[0] + 1e-10)) : 1.f;
    for (int d = threadIdx.x; d < kSearch * kSearch; d += kThreads)
        rows[(size_t)blockIdx.x * (kSearch * kSearch) + d] = scale * s.slope[(d / kSearch + kHalf) * kStride + d % kSearch + kHalf];
}

// One block, one tile, as in ssg_loss.
extern "C" __global__ void __launch_bounds__(SSG_THREADS, SSG_MIN_BLOCKS)
ssg_graph_backward(
    const float* __restrict__ image,            // [B, C, H, W]
    const unsigned char* __restrict__ mask,     // [B, 1, H, W]
    const long long* __restrict__ row_of,       // [B, 1, H, W]: masked pixels up to and including this one
    const float* __restrict__ rows,             // [N, search^2]: T
    const float* __restrict__ rows_gradient,    // [N, search^2]: G = dL/dT
    int channels, int height, int width,
    int tile_h, int tile_w, int tiles_y, int tiles_x, int first_tile,
    float inverse_kappa, int normalize,
    int* counts,                                // [tiles]
    float* slots                                // [tiles of this launch, C, tile_h + 2 r, tile_w + 2 r]
) {
    Shared& s = *reinterpret_cast<Shared*>(shared_memory);
    const int tile = first_tile + blockIdx.x, tile_in_image = tile % (tiles_y * tiles_x), b = tile / (tiles_y * tiles_x);
    const int y0 = tile_in_image / tiles_x * tile_h, x0 = tile_in_image % tiles_x * tile_w;
    const size_t size = (size_t)height * width;
    image += b * size * channels;
    row_of += b * size;

    const int count = select_pixels(s, mask + b * size, height, width, y0, x0, tile_h, tile_w);
    if (threadIdx.x == 0) counts[tile] = count;
    if (count == 0) return;

    const int slot_h = tile_h + 2 * kRadius, slot_w = tile_w + 2 * kRadius, slot_size = channels * slot_h * slot_w;
    float* slot = slots + (size_t)blockIdx.x * slot_size;
    for (int i = threadIdx.x; i < slot_size; i += kThreads) slot[i] = 0.f;
    clear_shared(s);

    for (int word = 0; word < kTileWords; ++word)
        for (unsigned bits = s.selected[word]; bits != 0; bits &= bits - 1) {
            const int pixel = word * 32 + __ffs(bits) - 1, ty = pixel / tile_w, tx = pixel % tile_w;
            const size_t row = (size_t)(row_of[(size_t)(y0 + ty) * width + x0 + tx] - 1) * (kSearch * kSearch);
            float weighted[1] = {0.f}, slope_sum[1] = {0.f};
            for (int d = threadIdx.x; d < kSearch * kSearch; d += kThreads) weighted[0] += rows[row + d] * rows_gradient[row + d];
            block_sum(s, weighted);
            const float q = normalize ? (float)s.total[0] : 0.f;
            for (int d = threadIdx.x; d < kSearch * kSearch; d += kThreads) {
                const float slope = -inverse_kappa * rows[row + d] * (rows_gradient[row + d] - q);
                s.slope[(d / kSearch + kHalf) * kStride + d % kSearch + kHalf] = slope;
                slope_sum[0] += slope;
            }
            block_sum(s, slope_sum);
            add_gradient(s, false, image, channels, height, width, y0 + ty, x0 + tx, (float)s.total[0], slot, slot_h, slot_w, ty, tx);
        }
}
