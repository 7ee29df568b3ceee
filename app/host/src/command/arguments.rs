//! Parsers for values of the command line, with errors in words of the interface.

use std::net::SocketAddr;
use std::str::FromStr;

use uuid::Uuid;

/// Parses a whole number of the type that the command stores it in.
///
/// # Errors
/// The form that was wanted.
pub fn whole<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| "wanted a whole number that is not so large".to_owned())
}

/// Parses a finite number, such as 0.5.
///
/// # Errors
/// The form that was wanted.
pub fn number(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|number: &f64| number.is_finite())
        .ok_or_else(|| "wanted a number, such as 0.5".to_owned())
}

/// Parses a number of seconds, alone or with a unit.
///
/// # Errors
/// The form that was wanted.
pub fn seconds(text: &str) -> Result<u32, String> {
    let with_unit =
        || crate::settings::parse_duration(text).and_then(|duration| u32::try_from(duration.as_secs()).ok());
    text.parse().ok().or_else(with_unit).ok_or_else(|| "wanted seconds, such as 3600, or 1h".to_owned())
}

/// Parses the id of a job.
///
/// # Errors
/// The form that was wanted.
pub fn job_id(text: &str) -> Result<Uuid, String> {
    text.parse()
        .map_err(|_| format!("wanted the id of a job; `{} jobs list` shows them", crate::program_name()))
}

/// Parses an IP address and a port.
///
/// # Errors
/// The form that was wanted.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "wanted an IP address and a port, such as 127.0.0.1:8443".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_said_in_words_of_the_interface() {
        assert_eq!(whole::<u16>("12"), Ok(12));
        assert_eq!((seconds("3600"), seconds("1h"), seconds("90s")), (Ok(3600), Ok(3600), Ok(90)));
        assert_eq!(number("0.5"), Ok(0.5));
        let wrong = [
            whole::<u16>("65536").unwrap_err(),
            whole::<u32>("x").unwrap_err(),
            number("x").unwrap_err(),
            number("inf").unwrap_err(),
            seconds("soon").unwrap_err(),
            job_id("nope").unwrap_err(),
            address("localhost:8443").unwrap_err(),
        ];
        for error in wrong {
            assert!(error.starts_with("wanted "), "{error}");
        }
    }
}
