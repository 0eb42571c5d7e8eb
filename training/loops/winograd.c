// Transforms of Winograd's algorithm F(4x4, 3x3); see winograd.py.
//
// Maps are float32 [n, h, w, c] and contiguous. They are divided into tiles of 4 x 4 pixels, [n, ceil(h/4), ceil(w/4)].
// Transformed tiles are float32 [36, n * tiles, c]. The first dimension has the stride `plane`. c is a multiple of 8.

#include <string.h>

typedef float lanes __attribute__((vector_size(32), aligned(4), may_alias));  // eight channels
typedef void transform(const lanes *in, lanes *out);  // one-dimensional
#define INLINE static inline __attribute__((always_inline))

// Six pixels of the input of a convolution -> six values. The matrix is B^T of Lavin and Gray.
INLINE void from_input(const lanes *d, lanes *o) {
    lanes a = d[4] - 4.f * d[2], b = d[3] - 4.f * d[1], c = d[4] - d[2], e = 2.f * (d[3] - d[1]);
    o[0] = 4.f * d[0] - 5.f * d[2] + d[4];
    o[1] = a + b;
    o[2] = a - b;
    o[3] = c + e;
    o[4] = c - e;
    o[5] = 4.f * d[1] - 5.f * d[3] + d[5];
}

// Six values -> four pixels of the output of a convolution. The matrix is A^T.
INLINE void to_output(const lanes *m, lanes *o) {
    lanes s = m[1] + m[2], d = m[1] - m[2], t = m[3] + m[4], e = m[3] - m[4];
    o[0] = m[0] + s + t;
    o[1] = d + 2.f * e;
    o[2] = s + 4.f * t;
    o[3] = d + 8.f * e + m[5];
}

// The transpose of to_output: four pixels of the gradient of the output -> six values. The matrix is A.
INLINE void from_output_gradient(const lanes *y, lanes *o) {
    lanes s = y[0] + y[2], d = y[1] + y[3], t = y[0] + 4.f * y[2], e = 2.f * y[1] + 8.f * y[3];
    o[0] = y[0];
    o[1] = s + d;
    o[2] = s - d;
    o[3] = t + e;
    o[4] = t - e;
    o[5] = y[3];
}

// The transpose of from_input: six values -> six pixels of the gradient of the input. The matrix is B.
INLINE void to_input_gradient(const lanes *v, lanes *o) {
    lanes s = v[1] + v[2], d = v[1] - v[2], t = v[3] + v[4], e = v[3] - v[4];
    o[0] = 4.f * v[0];
    o[1] = 4.f * v[5] - 4.f * d - 2.f * e;
    o[2] = -5.f * v[0] - 4.f * s - t;
    o[3] = d + 2.f * e - 5.f * v[5];
    o[4] = v[0] + s + t;
    o[5] = v[5];
}

// Apply a transform to the columns, and then to the rows.
INLINE void both(transform *apply, int in, int out, lanes (*x)[6], lanes (*y)[6]) {
    lanes half[6][6];  // [row of y][column of x]
    for (int column = 0; column < in; column++) {
        lanes values[6], results[6];
        for (int row = 0; row < in; row++) values[row] = x[row][column];
        apply(values, results);
        for (int row = 0; row < out; row++) half[row][column] = results[row];
    }
    for (int row = 0; row < out; row++) apply(half[row], y[row]);
}

// Transform tiles of `size` x `size` pixels. Tiles begin `before` pixels above and left. Pixels outside the map are 0.
INLINE void from_map(transform *apply, int size, int before, const float *map, float *tiles, long n, long h, long w,
                     long c, long plane) {
    const long rows = (h + 3) / 4, columns = (w + 3) / 4;
#pragma omp parallel for schedule(static)
    for (long tile = 0; tile < n * rows * columns; tile++) {
        const float *image = map + tile / (rows * columns) * h * w * c;
        const long top = tile / columns % rows * 4 - before, left = tile % columns * 4 - before;
        for (long channel = 0; channel < c; channel += 8) {
            lanes x[6][6], y[6][6];
            for (int i = 0; i < size; i++)
                for (int j = 0; j < size; j++) {
                    const long row = top + i, column = left + j;
                    const int inside = row >= 0 && row < h && column >= 0 && column < w;
                    x[i][j] = inside ? *(const lanes *)(image + (row * w + column) * c + channel) : (lanes){0};
                }
            both(apply, size, 6, x, y);
            for (int i = 0; i < 36; i++) *(lanes *)(tiles + i * plane + tile * c + channel) = y[i / 6][i % 6];
        }
    }
}

// Transform to tiles of `size` x `size` pixels, and add them to the map. Pixels outside the map are dropped.
INLINE void to_map(transform *apply, int size, int before, const float *tiles, float *map, long n, long h, long w,
                   long c, long plane) {
    const long rows = (h + 3) / 4, columns = (w + 3) / 4;
#pragma omp parallel for schedule(static)
    for (long index = 0; index < n; index++) {
        float *image = map + index * h * w * c;
        memset(image, 0, h * w * c * sizeof(float));
        for (long part = 0; part < rows * columns; part++) {
            const long tile = index * rows * columns + part;
            const long top = part / columns * 4 - before, left = part % columns * 4 - before;
            for (long channel = 0; channel < c; channel += 8) {
                lanes x[6][6], y[6][6];
                for (int i = 0; i < 36; i++) x[i / 6][i % 6] = *(const lanes *)(tiles + i * plane + tile * c + channel);
                both(apply, 6, size, x, y);
                for (int i = 0; i < size; i++)
                    for (int j = 0; j < size; j++) {
                        const long row = top + i, column = left + j;
                        const int inside = row >= 0 && row < h && column >= 0 && column < w;
                        if (inside) *(lanes *)(image + (row * w + column) * c + channel) += y[i][j];
                    }
            }
        }
    }
}

void transform_input(const float *map, float *tiles, long n, long h, long w, long c, long plane) {
    from_map(from_input, 6, 1, map, tiles, n, h, w, c, plane);
}

void transform_output(float *map, const float *tiles, long n, long h, long w, long c, long plane) {
    to_map(to_output, 4, 0, tiles, map, n, h, w, c, plane);
}

void transform_output_gradient(const float *map, float *tiles, long n, long h, long w, long c, long plane) {
    from_map(from_output_gradient, 4, 0, map, tiles, n, h, w, c, plane);
}

void transform_input_gradient(float *map, const float *tiles, long n, long h, long w, long c, long plane) {
    to_map(to_input_gradient, 6, 1, tiles, map, n, h, w, c, plane);
}
