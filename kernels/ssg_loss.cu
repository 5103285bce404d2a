// The fused self-similarity loss: values and gradient of sr, one visit to each masked pixel. A block owns one tile of pixels.
// A whole row stays in the registers of its block, so nothing of size rows * offsets is ever written, and nothing is
// computed twice. The formulas stand in ssg_entries.cuh.
#include "ssg_rows.cuh"

// Every thread learns the scales of the row whose sums are in s.total.
__device__ RowScale share_scale(Shared& s, bool normalize) {
    if (threadIdx.x == 0) {
        const RowScale z = row_scale(s.total[0], s.total[1], normalize);
        const float values[5] = {z.inverse_sr, z.inverse_gt, z.log_sr, z.log_gt, z.log_ratio};
        for (int i = 0; i < 5; ++i) s.row[i] = values[i];
    }
    __syncthreads();
    return {s.row[0], s.row[1], s.row[2], s.row[3], s.row[4]};
}

extern "C" __global__ void __launch_bounds__(SSG_THREADS, SSG_MIN_BLOCKS)
ssg_loss(
    const float* __restrict__ sr,               // [B, C, H, W]
    const float* __restrict__ gt,
    const unsigned char* __restrict__ mask,     // [B, 1, H, W]
    int channels, int height, int width,
    int tile_h, int tile_w, int tiles_y, int tiles_x,
    int first_tile,                             // of this launch; block i owns tile first_tile + i
    float inverse_kappa, float l1_weight, float kl_weight, int normalize, int with_gradient,
    double* sums,                               // [tiles, 2]: L1, KL
    int* counts,                                // [tiles]: masked pixels
    float* slots                                // [tiles of this launch, C, tile_h + 2 r, tile_w + 2 r]
) {
    Shared& s = *reinterpret_cast<Shared*>(shared_memory);
    const int tile = first_tile + blockIdx.x, tile_in_image = tile % (tiles_y * tiles_x), image = tile / (tiles_y * tiles_x);
    const int y0 = tile_in_image / tiles_x * tile_h, x0 = tile_in_image % tiles_x * tile_w;
    const size_t pixels = (size_t)height * width;
    sr += image * pixels * channels;
    gt += image * pixels * channels;

    const int count = select_pixels(s, mask + image * pixels, height, width, y0, x0, tile_h, tile_w);
    if (threadIdx.x == 0) {
        counts[tile] = count;
        sums[2 * (size_t)tile] = sums[2 * (size_t)tile + 1] = 0.;
    }
    if (count == 0) return;

    const int slot_h = tile_h + 2 * kRadius, slot_w = tile_w + 2 * kRadius, slot_size = channels * slot_h * slot_w;
    float* slot = slots + (size_t)blockIdx.x * slot_size;
    if (with_gradient)
        for (int i = threadIdx.x; i < slot_size; i += kThreads) slot[i] = 0.f;
    clear_shared(s);

    double l1 = 0., kl = 0.;
    for (int word = 0; word < kTileWords; ++word)
        for (unsigned bits = s.selected[word]; bits != 0; bits &= bits - 1) {
            const int pixel = word * 32 + __ffs(bits) - 1, ty = pixel / tile_w, tx = pixel % tile_w;
            float e_sr[kRounds][kRun], e_gt[kRounds][kRun];
            row_distances(s, gt, channels, height, width, y0 + ty, x0 + tx, e_gt);
            row_distances(s, sr, channels, height, width, y0 + ty, x0 + tx, e_sr);

            float row_sum[2] = {0.f, 0.f};
#pragma unroll
            for (int round = 0; round < kRounds; ++round)
#pragma unroll
                for (int v = 0; v < kRun; ++v) {
                    e_sr[round][v] = __fmul_rn(e_sr[round][v], inverse_kappa);
                    e_gt[round][v] = __fmul_rn(e_gt[round][v], inverse_kappa);
                    if (!is_offset(threadIdx.x + round * kThreads, v)) continue;
                    row_sum[0] += expf(-e_sr[round][v]);
                    row_sum[1] += expf(-e_gt[round][v]);
                }
            block_sum(s, row_sum);
            const RowScale z = share_scale(s, normalize != 0);

            float statistics[3] = {0.f, 0.f, 0.f}, t_sr;
#pragma unroll
            for (int round = 0; round < kRounds; ++round)
#pragma unroll
                for (int v = 0; v < kRun; ++v) {
                    if (!is_offset(threadIdx.x + round * kThreads, v)) continue;
                    const Entry entry = compare(e_sr[round][v], e_gt[round][v], z, l1_weight, kl_weight, t_sr);
                    statistics[0] += entry.l1;
                    statistics[1] += entry.kl;
                    statistics[2] += entry.weighted;
                }
            block_sum(s, statistics);
            l1 += s.total[0];
            kl += s.total[1];
            if (!with_gradient) continue;

            const float q = normalize ? (float)s.total[2] : 0.f;
            float slope_sum[1] = {0.f};
#pragma unroll
            for (int round = 0; round < kRounds; ++round)
#pragma unroll
                for (int v = 0; v < kRun; ++v) {
                    const int item = threadIdx.x + round * kThreads;
                    if (!is_offset(item, v)) continue;
                    const Entry entry = compare(e_sr[round][v], e_gt[round][v], z, l1_weight, kl_weight, t_sr);
                    const float slope = -inverse_kappa * (entry.weighted - t_sr * q);
                    s.slope[(run_line(item) + kHalf) * kStride + run_start(item) + v + kHalf] = slope;
                    slope_sum[0] += slope;
                }
            block_sum(s, slope_sum);
            add_gradient(s, channels <= kGroup, sr, channels, height, width, y0 + ty, x0 + tx, (float)s.total[0], slot, slot_h, slot_w, ty, tx);
        }
    if (threadIdx.x == 0) {
        sums[2 * (size_t)tile] = l1;
        sums[2 * (size_t)tile + 1] = kl;
    }
}
