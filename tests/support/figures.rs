//! Lines of the table of a bench.

/// Median of the values.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Prints a line with the median and the range.
pub fn line(what: &str, mut values: Vec<f64>, unit: &str) {
    values.sort_by(f64::total_cmp);
    let (low, middle, high) = (values[0], median(&values), values[values.len() - 1]);
    println!("{what:<58} {middle:>10.2} {unit:<4} ({low:.2} to {high:.2})");
}
