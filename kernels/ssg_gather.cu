// Sums the slots of the tiles into the gradient of the image: one thread per value of the image, tiles in a fixed order.
//
// A tile's slot holds gradients of the reflect-padded image. The padding's adjoint is folded in: a value of the image is the
// sum over the places of the padded image that repeat it, y itself, -y and 2 (H - 1) - y, and likewise for x.

// Padded coordinates that show i, in `at`; returns how many.
__device__ __forceinline__ int places(int i, int n, int radius, int (&at)[3]) {
    int count = 0;
    at[count++] = i + radius;
    if (i >= 1 && i <= radius) at[count++] = radius - i;
    if (i <= n - 2 && i >= n - 1 - radius) at[count++] = 2 * (n - 1) - i + radius;
    return count;
}

// Four blocks per multiprocessor: for more of them the compiler spills.
extern "C" __global__ void __launch_bounds__(256, 4)
ssg_gather(
    const float* __restrict__ slots,            // [last_tile - first_tile, splits, C, tile_h + 2 r, tile_w + 2 r]
    const int* __restrict__ counts,             // [tiles]: a tile without masked pixels has written no slot
    int batch, int channels, int height, int width, int radius,
    int tile_h, int tile_w, int tiles_y, int tiles_x, int first_tile, int last_tile,
    int splits, int overwrite,                  // or added to
    float* gradient                             // [B, C, H, W]
) {
    const size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (size_t)batch * channels * height * width) return;
    const int x = (int)(index % width), y = (int)(index / width % height), c = (int)(index / width / height % channels);
    const int first_of_image = (int)(index / width / height / channels) * tiles_y * tiles_x;
    const int slot_h = tile_h + 2 * radius, slot_w = tile_w + 2 * radius, slot_size = channels * slot_h * slot_w;

    int rows[3], columns[3];
    const int row_count = places(y, height, radius, rows), column_count = places(x, width, radius, columns);
    float sum = overwrite != 0 ? 0.f : gradient[index];
    for (int i = 0; i < row_count; ++i)
        for (int j = 0; j < column_count; ++j) {
            const int ty_first = max(0, (rows[i] - slot_h + tile_h) / tile_h), ty_last = min(tiles_y - 1, rows[i] / tile_h);
            const int tx_first = max(0, (columns[j] - slot_w + tile_w) / tile_w), tx_last = min(tiles_x - 1, columns[j] / tile_w);
            for (int ty = ty_first; ty <= ty_last; ++ty)
                for (int tx = tx_first; tx <= tx_last; ++tx) {
                    const int tile = first_of_image + ty * tiles_x + tx;
                    if (tile < first_tile || tile >= last_tile || counts[tile] == 0) continue;
                    const float* at = slots + (size_t)(tile - first_tile) * splits * slot_size
                        + (c * slot_h + rows[i] - ty * tile_h) * slot_w + columns[j] - tx * tile_w;
                    for (int split = 0; split < splits; ++split, at += slot_size) sum += *at;
                }
        }
    gradient[index] = sum;
}
