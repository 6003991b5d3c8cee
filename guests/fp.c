// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Floating point to the bit, each result checked by a second way to compute it, and kept apart between
 * processes.
 */
#include "guest.h"

#include <float.h>
#include <math.h>
#include <sched.h>
#include <sys/wait.h>

#define SERIES_TERMS 20

/* sin(x) for any x of moderate size: reduced to (-pi, pi), then its power series. */
static double sine_by_series(long double x)
{
	const long double pi = M_PIl;
	long double term, sum;

	x -= roundl(x / (2 * pi)) * (2 * pi);
	term = sum = x;
	for (int n = 1; n < SERIES_TERMS; n++) {
		term *= -x * x / ((2 * n) * (2 * n + 1));
		sum += term;
	}
	return (double)sum;
}

/* The square root with `shift` bits behind the point, correctly rounded, by integers alone. */
static double root_by_integers(uint64_t n, int shift)
{
	unsigned __int128 wanted = (unsigned __int128)n << (2 * shift);
	uint64_t root = 0;

	for (int bit = 62; bit >= 0; bit--) {
		uint64_t next = root | 1ULL << bit;
		if ((unsigned __int128)next * next <= wanted)
			root = next;
	}
	if (wanted - (unsigned __int128)root * root > root)
		root++;
	return ldexp((double)root, -shift);
}

#define SINES 5000
#define ROOTS 2000
/* Half a unit in the last place of either result, and the error of the reduction. */
#define SINE_TOLERANCE 1e-15
#define SWITCHES 20

static double sum_of_sines(void)
{
	double sum = 0;

	for (int i = 1; i < SINES; i++)
		sum += sin(i) * sqrt(i);
	return sum;
}

static void sine(void)
{
	double worst = 0;

	for (int i = 1; i < SINES; i++)
		worst = fmax(worst, fabs(sin(i) - sine_by_series(i)));
	expect("sin against its series", worst < SINE_TOLERANCE, "largest difference %g", worst);
}

static void square_root(void)
{
	int wrong = 0;

	for (uint64_t n = 1; n < ROOTS; n++) {
		int integer_bits = 0;

		/* A root with this many bits before the point has 53 minus as many behind it. */
		while ((1ULL << (2 * integer_bits)) <= n)
			integer_bits++;
		wrong += sqrt((double)n) != root_by_integers(n, DBL_MANT_DIG - integer_bits);
	}
	expect("sqrt is correctly rounded", wrong == 0, "%d of %d wrong", wrong, ROOTS - 1);
}

static void precision(void)
{
	volatile long double one = 1.0L, last_bit = LDBL_EPSILON;
	volatile double smallest = DBL_MIN;

	expect("x87 has 64 bits of precision", one + last_bit != one && one + last_bit / 2 == one,
	       "1 + 2^-63 %s 1", one + last_bit != one ? "!=" : "==");
	expect("denormal numbers", smallest / 2 > 0 && smallest / 2 * 2 == smallest, "%a", smallest / 2);
}

/* FPREM, through fmodl, has no rounding error at all: integers must come out as integer division has it. */
static void remainder_is_exact(void)
{
	const uint64_t modulus = 1000003;
	int wrong = 0;

	for (int bit = 0; bit < 64; bit++) {
		uint64_t n = UINT64_MAX >> bit;

		wrong += fmodl((long double)n, (long double)modulus) != (long double)(n % modulus);
	}
	expect("fprem is exact", wrong == 0, "%d of 64 wrong", wrong);
}

/* Bits 13 and 14 of MXCSR (SDM volume 1, section 10.2.3). */
#define MXCSR_ROUNDING_SHIFT 13

static void rounding(void)
{
	/* What -2.5 becomes: to nearest even, down, up, towards zero. */
	static const int rounded[] = { -2, -3, -2, -2 };
	double value = -2.5;
	unsigned int saved;
	int wrong = 0;

	asm volatile("stmxcsr %0" : "=m"(saved));
	for (unsigned int mode = 0; mode < sizeof(rounded) / sizeof(rounded[0]); mode++) {
		unsigned int changed = saved | mode << MXCSR_ROUNDING_SHIFT;
		int got;

		asm volatile("ldmxcsr %1\n\tcvtsd2si %2, %0\n\tldmxcsr %3"
			     : "=r"(got)
			     : "m"(changed), "x"(value), "m"(saved));
		wrong += got != rounded[mode];
	}
	expect("rounding modes of MXCSR", wrong == 0, "%d of 4 wrong", wrong);
}

/* Two processes computing in turn must not see each other's registers. */
static void task_switches(void)
{
	double alone = sum_of_sines();
	int wrong = 0, status = 0;
	pid_t child = fork();

	for (int i = 0; i < SWITCHES; i++) {
		sched_yield();
		wrong += sum_of_sines() != alone;
	}
	if (child == 0)
		_exit(wrong != 0);
	waitpid(child, &status, 0);
	expect("registers across task switches", wrong == 0 && status == 0,
	       "%d of %d sums differ, the other process %s", wrong, SWITCHES, status ? "differs" : "agrees");
}

int main(void)
{
	sine();
	square_root();
	precision();
	remainder_is_exact();
	rounding();
	task_switches();
	return summary("fp");
}
