// The fused loss where most pixels are masked, tile by tile, in passes over all offsets: the distances are formed anew in each,
// which costs less than keeping them. First the sums of the rows, then values and q, then the gradient (see ssg_entries.cuh).
//
// The mask's density chooses, tile by tile and on the GPU, so that the host never waits: ssg_dense_choose leaves the pixels of
// the other tiles to ssg_loss. Blocks of tiles that are not dense return at once.
#include "ssg_dense.cuh"

// A block is one warp: `splits` of them share a tile, each with its own columns of offsets.
struct Unit {
    int tile, split;
    size_t image;
    int y0, x0;

    __device__ Unit(int first_tile, int splits, int tiles_y, int tiles_x) {
        tile = first_tile + (int)blockIdx.x / splits;
        split = blockIdx.x % splits;
        image = tile / (tiles_y * tiles_x);
        y0 = tile % (tiles_y * tiles_x) / tiles_x * kRows;
        x0 = tile % tiles_x * kColumns;
    }
    __device__ Picture picture(const float* images, int height, int width) const {
        return {images + image * kChannels * height * width, height, width, y0, x0};
    }
};

// One block, one tile.
extern "C" __global__ void __launch_bounds__(32)
ssg_dense_choose(
    const unsigned char* __restrict__ mask,     // [B, 1, H, W]
    int height, int width, int tiles_y, int tiles_x,
    int least,                                  // masked pixels that make a tile dense
    int* counts,                                // [tiles]: masked pixels of the dense tiles, 0 for the others
    unsigned char* others                       // [B, 1, H, W]: the mask without the dense tiles
) {
    const Unit unit(0, 1, tiles_y, tiles_x);
    const size_t image = unit.image * height * width;
    const int x = unit.x0 + (int)threadIdx.x, rows = min(kRows, height - unit.y0);
    const bool exists = (int)threadIdx.x < kColumns && x < width;
    int count = 0;
    for (int i = 0; i < rows; ++i)
        count += __popc(__ballot_sync(0xffffffffu, exists && mask[image + (size_t)(unit.y0 + i) * width + x] != 0));
    const bool dense = count >= least;
    if (threadIdx.x == 0) counts[unit.tile] = dense ? count : 0;
    for (int i = 0; i < rows && exists; ++i) {
        const size_t at = image + (size_t)(unit.y0 + i) * width + x;
        others[at] = dense ? 0 : mask[at];
    }
}

// Sums of s over this block's offsets, for every pixel of the tile.
struct RowSums {
    Picture picture;
    float inverse_kappa, *sum, *rest;           // [kRows, kColumns]

    template <int kSize, int kCut>
    __device__ void walk(const Lines& lines, int dy, int valid) {
        Walker<kSize, kCut> walker(picture, lines, dy);
#pragma unroll 4
        for (int j = 0; j < kLines; ++j) {
            float dist[kSize], s = 0.f;
            walker.step(picture, lines, dy, j, dist);
            if (j < 2 * kHalf) continue;
#pragma unroll
            for (int k = 0; k < kSize; ++k)
                if (k < valid) s += expf(-__fmul_rn(dist[k], inverse_kappa));
            const int cell = lines.cell(j - 2 * kHalf);
            if (threadIdx.x < kColumns) add_exactly(sum[cell], rest[cell], s);
        }
    }
};

extern "C" __global__ void __launch_bounds__(32)
ssg_dense_sums(
    const float* __restrict__ images,           // [B, C, H, W]
    const int* __restrict__ counts,
    int height, int width, int tiles_y, int tiles_x, int splits, float inverse_kappa,
    double* sums                                // [splits, B, H, W]: written in dense tiles alone
) {
    const Unit unit(0, splits, tiles_y, tiles_x);
    if (counts[unit.tile] == 0) return;
    float* cells = reinterpret_cast<float*>(shared_memory);
    RowSums pass{unit.picture(images, height, width), inverse_kappa, cells, cells + kRows * kColumns};
    for (int i = threadIdx.x; i < 2 * kRows * kColumns; i += 32) cells[i] = 0.f;
    __syncwarp();
    walk_offsets(pass, pass.picture, unit.split, splits);
    const size_t batch = gridDim.x / (splits * tiles_y * tiles_x);
    sums += (unit.split * batch + unit.image) * height * width;
    for (int i = threadIdx.x; i < kRows * kColumns; i += 32) {
        const int y = unit.y0 + i / kColumns, x = unit.x0 + i % kColumns;
        if (y < height && x < width) sums[(size_t)y * width + x] = (double)pass.sum[i] + pass.rest[i];
    }
}

// One thread, one pixel: what its row is divided by.
extern "C" __global__ void __launch_bounds__(256)
ssg_dense_scales(
    const double* __restrict__ sums_sr,         // [splits, B, H, W]; not read when un-normalised
    const double* __restrict__ sums_gt,
    const unsigned char* __restrict__ mask,
    const int* __restrict__ counts,
    int batch, int height, int width, int tiles_y, int tiles_x, int splits, int normalize,
    float4* scales,                             // [B, H, W]: 1 / Z_sr, 1 / Z_gt, ln Z_sr, ln Z_gt; 1 / Z_sr = 0: no row of this path
    float* ratios                               // [B, H, W]: ln(Z_sr / Z_gt)
) {
    const size_t pixels = (size_t)batch * height * width, index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= pixels) return;
    const int x = (int)(index % width), y = (int)(index / width % height), b = (int)(index / width / height);
    RowScale z = {0.f, 0.f, 0.f, 0.f, 0.f};
    if (mask[index] != 0 && counts[(b * tiles_y + y / kRows) * tiles_x + x / kColumns] > 0) {
        double sum_sr = 0., sum_gt = 0.;
        for (int split = 0; normalize != 0 && split < splits; ++split) {
            sum_sr += sums_sr[split * pixels + index];
            sum_gt += sums_gt[split * pixels + index];
        }
        z = row_scale(sum_sr, sum_gt, normalize != 0);
    }
    scales[index] = {z.inverse_sr, z.inverse_gt, z.log_sr, z.log_gt};
    ratios[index] = z.log_ratio;
}

// Both pictures of a tile and the scales of its rows.
struct Pair {
    Picture sr, gt;
    const float4* scales;
    const float* ratios;
    float inverse_kappa, l1_weight, kl_weight;

    // Whether there is a row of this path at line i and this lane; its place in the maps [H, W] and its scale.
    __device__ __forceinline__ bool find(const Lines& lines, int i, int& pixel, RowScale& z) const {
        const int y = sr.y0 + lines.tile_row(i), x = sr.x0 + lines.tile_column();
        if ((int)threadIdx.x >= kColumns || y >= sr.height || x >= sr.width) return false;
        pixel = y * sr.width + x;
        const float4 four = scales[pixel];
        z = {four.x, four.y, four.z, four.w, ratios[pixel]};
        return z.inverse_sr != 0.f;  // a row without pixels; NaN is none of those
    }
    __device__ __forceinline__ Entry entry(float dist_sr, float dist_gt, const RowScale& z, float& t_sr) const {
        return compare(__fmul_rn(dist_sr, inverse_kappa), __fmul_rn(dist_gt, inverse_kappa), z, l1_weight, kl_weight, t_sr);
    }
};

// L1, KL and q of this block's offsets.
struct Values {
    Pair pair;
    float *sum, *rest;                          // [kRows, kColumns]: q
    float l1[2], kl[2];

    template <int kSize, int kCut>
    __device__ void walk(const Lines& lines, int dy, int valid) {
        Walker<kSize, kCut> sr(pair.sr, lines, dy), gt(pair.gt, lines, dy);
#pragma unroll 4
        for (int j = 0; j < kLines; ++j) {
            float dist_sr[kSize], dist_gt[kSize], t_sr, values[3] = {0.f, 0.f, 0.f};
            gt.step(pair.gt, lines, dy, j, dist_gt);
            sr.step(pair.sr, lines, dy, j, dist_sr);
            RowScale z;
            int pixel;
            if (j < 2 * kHalf || !pair.find(lines, j - 2 * kHalf, pixel, z)) continue;
#pragma unroll
            for (int k = 0; k < kSize; ++k) {
                if (k >= valid) break;
                const Entry entry = pair.entry(dist_sr[k], dist_gt[k], z, t_sr);
                values[0] += entry.l1;
                values[1] += entry.kl;
                values[2] += entry.weighted;
            }
            const int cell = lines.cell(j - 2 * kHalf);
            add_exactly(l1[0], l1[1], values[0]);
            add_exactly(kl[0], kl[1], values[1]);
            add_exactly(sum[cell], rest[cell], values[2]);
        }
    }
};

extern "C" __global__ void __launch_bounds__(32)
ssg_dense_values(
    const float* __restrict__ sr,               // [B, C, H, W]
    const float* __restrict__ gt,
    const int* __restrict__ counts,
    const float4* __restrict__ scales,
    const float* __restrict__ ratios,
    int height, int width, int tiles_y, int tiles_x, int splits, float inverse_kappa, float l1_weight, float kl_weight,
    double* sums,                               // [tiles, splits, 2]: L1, KL
    float* q                                    // [splits, B, H, W]: written in dense tiles alone
) {
    const Unit unit(0, splits, tiles_y, tiles_x);
    double l1 = 0., kl = 0.;
    if (counts[unit.tile] > 0) {
        const size_t size = (size_t)height * width, batch = gridDim.x / (splits * tiles_y * tiles_x);
        float* cells = reinterpret_cast<float*>(shared_memory);
        const Pair pair{unit.picture(sr, height, width), unit.picture(gt, height, width), scales + unit.image * size,
                        ratios + unit.image * size, inverse_kappa, l1_weight, kl_weight};
        Values pass{pair, cells, cells + kRows * kColumns, {0.f, 0.f}, {0.f, 0.f}};
        for (int i = threadIdx.x; i < 2 * kRows * kColumns; i += 32) cells[i] = 0.f;
        __syncwarp();
        walk_offsets(pass, pair.sr, unit.split, splits);
        q += (unit.split * batch + unit.image) * size;
        for (int i = threadIdx.x; i < kRows * kColumns; i += 32) {
            const int y = unit.y0 + i / kColumns, x = unit.x0 + i % kColumns;
            if (y < height && x < width) q[(size_t)y * width + x] = pass.sum[i] + pass.rest[i];
        }
        l1 = (double)pass.l1[0] + pass.l1[1];
        kl = (double)pass.kl[0] + pass.kl[1];
        for (int step = 16; step > 0; step /= 2) {
            l1 += __shfl_down_sync(0xffffffffu, l1, step);
            kl += __shfl_down_sync(0xffffffffu, kl, step);
        }
    }
    if (threadIdx.x == 0) {
        sums[2 * (size_t)blockIdx.x] = l1;
        sums[2 * (size_t)blockIdx.x + 1] = kl;
    }
}

// The pull of A = dL/d dist. With B_d(x) = sum_{u in W_d} A(x - u, d) and F = 2 B_d(x) (I(x + d) - I(x)), x + d gets F and x gets -F;
// what falls outside the square pulls x towards 0: 2 I(x) sum_d sum_{u not in W_d} A(x - u, d).
struct Gradient {
    Pair pair;
    const float* q;                             // [H, W]
    float* pull;                                // [kGroup + 1, kRows, 32]: 2 A, summed along the window's columns; the last of all offsets
    float* slot;                                // [C, kRows + 2 r, kColumns + 2 r]
    int normalize;

    static constexpr int kSlotRows = kRows + 2 * kRadius, kSlotColumns = kColumns + 2 * kRadius;

    template <int kSize, int kCut>
    __device__ void walk(const Lines& lines, int dy, int valid) {
        find_pull<kSize, kCut>(lines, dy, valid);
        spread<kSize, kCut>(lines, dy);
    }

    template <int kSize, int kCut>
    __device__ __forceinline__ void find_pull(const Lines& lines, int dy, int valid) {
        Walker<kSize, kCut> sr(pair.sr, lines, dy), gt(pair.gt, lines, dy);
#pragma unroll 4
        for (int j = 0; j < kLines; ++j) {
            float dist_sr[kSize], dist_gt[kSize], slope[kSize], t_sr, slopes = 0.f;
            gt.step(pair.gt, lines, dy, j, dist_gt);
            sr.step(pair.sr, lines, dy, j, dist_sr);
            if (j < 2 * kHalf) continue;
            RowScale z;
            int pixel;
            const bool found = pair.find(lines, j - 2 * kHalf, pixel, z);
            const float mean = found && normalize != 0 ? q[pixel] : 0.f;
#pragma unroll
            for (int k = 0; k < kSize; ++k) {
                slope[k] = 0.f;
                if (!found || k >= valid) continue;
                const Entry entry = pair.entry(dist_sr[k], dist_gt[k], z, t_sr);
                slope[k] = -2.f * pair.inverse_kappa * (entry.weighted - t_sr * mean);
                slopes += slope[k];
            }
            float* to = pull + (j - 2 * kHalf) * 32 + threadIdx.x;
#pragma unroll
            for (int k = 0; k < kSize; ++k)
                to[k * kRows * 32] = lines.cuts_columns() ? sum_before(slope[k], lines.columns_inside) : sum_before(slope[k], kWindow);
            if (kCut > 0 || lines.cuts_columns()) to[kGroup * kRows * 32] = sum_before(slopes, kWindow);
        }
    }

    // Each lane reads what it has written itself.
    template <int kSize, int kCut>
    __device__ __forceinline__ void spread(const Lines& lines, int dy) {
        constexpr int kLast = kLines + kSize - 1;       // until the last of the rows x + d has all that it gets
        const int lane = threadIdx.x;
        const bool reaches = lane + lines.dx < kColumns + kRadius + kHalf;
        const int own = slot_column(lines, lane), other = slot_column(lines, lane + lines.dx);
        Sums<kSize, kWindow - kCut, kCut == 0 ? 0 : 1> boxes;
        Running<kWindow> whole;
        float moved[kSize][kChannels], given[kSize][kChannels];
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
            if (k > 0) read(pair.sr, lines.row(pair.sr, dy + k - 1), lines.moved, moved[k]);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) given[k][c] = 0.f;
        }
#pragma unroll 4
        for (int j = 0; j < kLast; ++j) {
            float base[kChannels], kept[kChannels], box[kSize], boxed = 0.f;
            read(pair.sr, lines.row(pair.sr, j), lines.base, base);
#pragma unroll
            for (int k = 0; k + 1 < kSize; ++k)
#pragma unroll
                for (int c = 0; c < kChannels; ++c) moved[k][c] = moved[k + 1][c];
            read(pair.sr, lines.row(pair.sr, j + dy + kSize - 1), lines.moved, moved[kSize - 1]);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) kept[c] = 0.f;
#pragma unroll
            for (int k = 0; k < kSize; ++k) box[k] = j < kRows ? pull[(k * kRows + j) * 32 + lane] : 0.f;
            boxes.feed(box);
#pragma unroll
            for (int k = 0; k < kSize; ++k) {
                boxed += box[k];
#pragma unroll
                for (int c = 0; c < kChannels; ++c) {
                    const float difference = moved[k][c] - base[c];
                    given[k][c] = fmaf(box[k], difference, given[k][c]);
                    kept[c] = fmaf(-box[k], difference, kept[c]);
                }
            }
            if (kCut > 0 || lines.cuts_columns()) {
                const float outside = whole.feed(j < kRows ? pull[(kGroup * kRows + j) * 32 + lane] : 0.f) - boxed;
#pragma unroll
                for (int c = 0; c < kChannels; ++c) kept[c] = fmaf(base[c], outside, kept[c]);
            }
            // in turns: the lane dx further owns the column that this one gives to
            if (j < kLines) add_to_slot(lines, j, own, kept);
            __syncwarp();
            if (reaches && j + dy < kRows + kRadius + kHalf) add_to_slot(lines, j + dy, other, given[0]);
            __syncwarp();
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
#pragma unroll
                for (int k = 0; k + 1 < kSize; ++k) given[k][c] = given[k + 1][c];
                given[kSize - 1][c] = 0.f;
            }
        }
    }

    __device__ __forceinline__ int slot_column(const Lines& lines, int column) const {
        const int from_left = column + kRadius - kHalf;
        return lines.right > 0 ? from_left : kSlotColumns - 1 - from_left;
    }
    __device__ __forceinline__ void add_to_slot(const Lines& lines, int line, int column, const float (&value)[kChannels]) {
        const int from_top = line + kRadius - kHalf, row = lines.down > 0 ? from_top : kSlotRows - 1 - from_top;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) slot[(c * kSlotRows + row) * kSlotColumns + column] += value[c];
    }
};

extern "C" __global__ void __launch_bounds__(32)
ssg_dense_gradient(
    const float* __restrict__ sr,               // [B, C, H, W]
    const float* __restrict__ gt,
    const int* __restrict__ counts,
    const float4* __restrict__ scales,
    const float* __restrict__ ratios,
    const float* __restrict__ q,                // [B, H, W]
    int height, int width, int tiles_y, int tiles_x, int splits, int first_tile,
    float inverse_kappa, float l1_weight, float kl_weight, int normalize,
    float* slots                                // [tiles of this launch, splits, C, kRows + 2 r, kColumns + 2 r]
) {
    const Unit unit(first_tile, splits, tiles_y, tiles_x);
    if (counts[unit.tile] == 0) return;
    constexpr int kSlot = kChannels * Gradient::kSlotRows * Gradient::kSlotColumns;
    const size_t map = unit.image * height * width;
    const Pair pair{unit.picture(sr, height, width), unit.picture(gt, height, width), scales + map, ratios + map,
                    inverse_kappa, l1_weight, kl_weight};
    Gradient pass{pair, q + map, reinterpret_cast<float*>(shared_memory), slots + (size_t)blockIdx.x * kSlot, normalize};
    for (int i = threadIdx.x; i < kSlot; i += 32) pass.slot[i] = 0.f;
    __syncwarp();
    walk_offsets(pass, pair.sr, unit.split, splits);
}
