/* Follows golden rows and `run`, which source.py writes. Exit status: 0 if every output is within tolerance. */
#include <math.h>
#include <stdio.h>

static float workspace[MODEL_WORKSPACE], out[ROWS * OUTPUTS];

static int differs(size_t batch)
{
    float largest = 0.0f;
    int fine = 1;
    for (size_t row = 0; row < ROWS; row += batch)
        run(row, batch, out + row * OUTPUTS, workspace);
    for (size_t i = 0; i < ROWS * OUTPUTS; i++) {
        const float difference = fabsf(out[i] - expected[i]);
        fine = fine && difference <= TOLERANCE; /* false for NaN */
        largest = difference > largest ? difference : largest;
    }
    printf("batch %u, %d lanes: off by %.1e, allowed %.1e: %s\n", (unsigned)batch, model_lanes, (double)largest,
           (double)TOLERANCE, fine ? "ok" : "WRONG");
    return !fine;
}

int main(void)
{
    const int wrong = differs(1) + differs(ROWS);
    puts(wrong ? "FAIL" : "PASS");
    return wrong != 0;
}
