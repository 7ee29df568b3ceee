//! Schedules of the settings: they change the schedules of the program, or are new.

use std::time::Duration;

use jiff::Timestamp;
use perennial_workers::cron::{
    CronExpression, JobTemplate, MAX_CATCH_UP, MAX_JITTER, Misfire, Overlap, Schedule, Unreadable, check_name,
};
use perennial_workers::{Registry, queue};
use serde::{Deserialize, Deserializer, de};
use toml::Value;

use crate::settings::{Reader, Setting, parse_duration};

const KEY: &str = "cron.schedules";
const MILLISECOND: Duration = Duration::from_millis(1);
const MINUTE: Duration = Duration::from_secs(60);
/// Default limits of `catch_up`: the number of missed times, and their maximum age.
const CATCH_UP: (u32, Duration) = (10, Duration::from_secs(3600));

/// Settings of schedules.
#[derive(Debug)]
pub(crate) struct Config {
    entries: Vec<(String, ScheduleEntry)>,
    /// Interval at which the timer looks for due schedules.
    pub(crate) poll: Duration,
    /// Whether the tick wakes the timer.
    pub(crate) tick: bool,
}

/// A schedule of the settings, or their changes to a schedule of the program.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct ScheduleEntry {
    name: String,
    expression: Option<String>,
    zone: Option<String>,
    job: Option<String>,
    payload: Option<Value>,
    misfire: Option<MisfireWord>,
    #[serde(default, deserialize_with = "duration")]
    grace: Option<Duration>,
    catch_up: Option<u32>,
    #[serde(default, deserialize_with = "duration")]
    catch_up_within: Option<Duration>,
    overlap: Option<Overlap>,
    #[serde(default, deserialize_with = "duration")]
    jitter: Option<Duration>,
    #[serde(default, deserialize_with = "time")]
    from: Option<Timestamp>,
    #[serde(default, deserialize_with = "time")]
    until: Option<Timestamp>,
    paused: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum MisfireWord {
    Skip,
    Coalesce,
    CatchUp,
}

/// A field that does not fit, and the value that was wanted.
type Wrong = (&'static str, String);

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let duration = parse_duration(&text);
    duration.map(Some).ok_or_else(|| de::Error::custom(<Duration as Setting>::WANTED))
}

fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    // A time may be a text, or a date-time of TOML.
    let text = Value::deserialize(deserializer)?.to_string();
    let time = text.trim_matches('"').parse();
    time.map(Some).map_err(|_| de::Error::custom("a time such as 2027-01-01T00:00:00Z"))
}

/// Reads the settings, and notes every field that does not fit.
pub(crate) fn config(settings: &mut Reader<'_>) -> Config {
    let values: Vec<Value> = settings.read_with(KEY, "a list of tables", |value| value.as_array().cloned());
    let mut entries = Vec::<(String, ScheduleEntry)>::new();
    for (index, value) in values.into_iter().enumerate() {
        let entry: ScheduleEntry = match serde_path_to_error::deserialize(value.clone()) {
            Ok(entry) => entry,
            Err(error) => {
                let path = Some(error.path().to_string()).filter(|path| path != ".");
                let field = path.as_deref().unwrap_or_default();
                let dot = if field.is_empty() { "" } else { "." };
                let wanted = wanted(&error.inner().to_string());
                settings.refuse_part(KEY, &format!("[{index}]{dot}{field}"), value.get(field), &wanted);
                continue;
            }
        };
        let mut wrong = entry.check();
        if entries.iter().any(|(_, other)| other.name == entry.name) {
            wrong.push(("name", "a name that no other entry has".to_owned()));
        }
        for (field, wanted) in wrong {
            settings.refuse_part(KEY, &format!("[{index}].{field}"), value.get(field), &wanted);
        }
        if entry.is_never_due(Timestamp::now()) {
            settings.note(format!("{KEY}[{index}]: the schedule {} is never due again", entry.name));
        }
        entries.push((format!("{KEY}[{index}]"), entry));
    }
    Config {
        entries,
        poll: settings.duration("cron.poll", MILLISECOND..=MINUTE),
        tick: settings.get("cron.tick"),
    }
}

impl Config {
    /// Returns the schedules of the program, changed by the settings, and the schedules that only the settings have.
    ///
    /// # Errors
    /// One error that lists every entry that does not fit the registered kinds of jobs.
    pub(crate) fn schedules(&self, own: Vec<Schedule>, registry: &Registry) -> anyhow::Result<Vec<Schedule>> {
        let mut schedules = own;
        let names = own_names(&schedules);
        let mut problems = Vec::new();
        for (place, entry) in &self.entries {
            let own = schedules.iter().position(|schedule| schedule.name == entry.name);
            let made = match own {
                Some(index) => entry.change(schedules[index].clone(), registry),
                None => entry.schedule(registry, &names),
            };
            match (made, own) {
                (Ok(schedule), Some(index)) => schedules[index] = schedule,
                (Ok(schedule), None) => schedules.push(schedule),
                (Err((field, wanted)), _) => {
                    problems.push(format!("{place}.{field}, of {:?}: wanted {wanted}", entry.name));
                }
            }
        }
        if problems.is_empty() {
            return Ok(schedules);
        }
        anyhow::bail!("the schedules in the settings cannot be used:\n  {}", problems.join("\n  "))
    }
}

impl ScheduleEntry {
    /// Returns true when the entry has an expression that is due at no time from now on, within its bounds.
    fn is_never_due(&self, now: Timestamp) -> bool {
        let zone = self.zone.as_deref().unwrap_or("UTC");
        let Some(Ok(expression)) = self.expression.as_deref().map(|text| CronExpression::parse(text, zone))
        else {
            return self.until.is_some_and(|until| until < now);
        };
        let next = expression.next_after(self.from.map_or(now, |from| from.max(now)));
        next.is_none_or(|next| self.until.is_some_and(|until| next > until))
    }

    /// Returns the fields that do not fit, as far as this is known without the kinds of jobs.
    fn check(&self) -> Vec<Wrong> {
        let mut wrong = Vec::new();
        let mut unless = |fits: bool, field, wanted: &str| {
            if !fits {
                wrong.push((field, wanted.to_owned()));
            }
        };
        let misfire = |word| self.misfire == Some(word);
        unless(self.grace.is_none() || misfire(MisfireWord::Skip), "grace", "misfire = \"skip\" beside it");
        let catches_up = misfire(MisfireWord::CatchUp);
        unless(self.catch_up.is_none() || catches_up, "catch_up", "misfire = \"catch_up\" beside it");
        let within = self.catch_up_within.is_none() || catches_up;
        unless(within, "catch_up_within", "misfire = \"catch_up\" beside it");
        let most = format!("a whole number from 1 to {MAX_CATCH_UP}");
        unless(self.catch_up.is_none_or(|most| (1..=MAX_CATCH_UP).contains(&most)), "catch_up", &most);
        unless(self.jitter.is_none_or(|jitter| jitter <= MAX_JITTER), "jitter", "at most 24h");
        let is_window = self.from.zip(self.until).is_none_or(|(from, until)| from <= until);
        unless(is_window, "until", "a time after from");
        if let Err(error) = check_name(&self.name) {
            wrong.push(("name", format!("one that can be used; {error}")));
        }
        let expression = self.expression.as_deref().unwrap_or("@daily");
        if let Err(error) = CronExpression::parse(expression, self.zone.as_deref().unwrap_or("UTC")) {
            wrong.push(unreadable(&error));
        }
        wrong
    }

    /// Makes a schedule that only the settings have.
    fn schedule(&self, registry: &Registry, names: &str) -> Result<Schedule, Wrong> {
        let (Some(expression), Some(kind)) = (&self.expression, &self.job) else {
            return Err((
                "name",
                format!("one of {names}, to change it; or an expression and a job beside it"),
            ));
        };
        let zone = self.zone.as_deref().unwrap_or("UTC");
        let expression = CronExpression::parse(expression, zone).map_err(|error| unreadable(&error))?;
        let template = job(registry, kind, self.payload.as_ref())?;
        let schedule = Schedule::of(&self.name, expression, template);
        self.change(schedule.map_err(|error| ("name", format!("one that can be used; {error}")))?, registry)
    }

    /// Applies the fields of this entry to a schedule.
    fn change(&self, schedule: Schedule, registry: &Registry) -> Result<Schedule, Wrong> {
        let mut changed = schedule;
        if self.expression.is_some() || self.zone.is_some() {
            let expression = self.expression.as_deref().unwrap_or(changed.expression.as_str());
            let zone = self.zone.as_deref().unwrap_or(changed.expression.zone_name());
            changed.expression =
                CronExpression::parse(expression, zone).map_err(|error| unreadable(&error))?;
        }
        match (&self.job, &self.payload) {
            (Some(kind), payload) => changed.job = job(registry, kind, payload.as_ref())?,
            (None, Some(payload)) => {
                changed.job.payload = job(registry, &changed.job.kind, Some(payload))?.payload;
            }
            (None, None) => {}
        }
        if let Some(misfire) = self.misfire {
            changed.misfire = self.misfire(misfire);
        }
        changed.overlap = self.overlap.unwrap_or(changed.overlap);
        if let Some(jitter) = self.jitter {
            changed = changed.jitter(jitter);
        }
        changed.from = self.from.or(changed.from);
        changed.until = self.until.or(changed.until);
        changed.paused = self.paused.unwrap_or(changed.paused);
        Ok(changed)
    }

    fn misfire(&self, word: MisfireWord) -> Misfire {
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        match word {
            MisfireWord::Skip => match self.grace {
                Some(grace) => Misfire::Skip { grace_ms: ms(grace) },
                None => Misfire::SKIP,
            },
            MisfireWord::Coalesce => Misfire::Coalesce,
            MisfireWord::CatchUp => Misfire::CatchUp {
                most: self.catch_up.unwrap_or(CATCH_UP.0),
                within_ms: ms(self.catch_up_within.unwrap_or(CATCH_UP.1)),
            },
        }
    }
}

/// Extracts the value that was wanted from an error of the deserializer.
fn wanted(error: &str) -> String {
    let error = error.lines().next().unwrap_or_default();
    match error.split_once(", expected ") {
        Some((given, known)) if given.starts_with("unknown field ") => known.replace('`', ""),
        _ => crate::api::wanted(error),
    }
}

/// Names of the schedules of the program, separated by commas.
fn own_names(schedules: &[Schedule]) -> String {
    schedules.iter().map(|schedule| schedule.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn unreadable(error: &Unreadable) -> Wrong {
    let field = match error {
        Unreadable::Expression(_) => "expression",
        Unreadable::Zone(_) => "zone",
    };
    (field, format!("one that can be read; {error}"))
}

fn job(registry: &Registry, kind: &str, payload: Option<&Value>) -> Result<JobTemplate, Wrong> {
    let Some(kind) = registry.kind(kind) else {
        let known = registry.kinds().collect::<Vec<_>>().join(", ");
        return Err(("job", format!("one of {known}; there is no {kind}")));
    };
    let payload = payload.map(serde_json::to_string).transpose();
    let payload = payload.map_err(|error| ("payload", error.to_string()))?.unwrap_or_else(|| "{}".to_owned());
    let job = kind.job(&payload).map_err(|error| match error {
        queue::Error::Misfit { field, reason, .. } => {
            ("payload", format!("what the job reads; {field}: {}", crate::api::wanted(&reason)))
        }
        error => ("payload", format!("a payload that the job reads; {error}")),
    })?;
    Ok(job.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Settings, Sources};

    fn problems(list: &str) -> String {
        let set = vec![format!("cron.schedules={list}")];
        let schema = "[cron]\nschedules = []\npoll = '1s'\ntick = true";
        let settings = Settings::load(&[schema], &Sources { set, ..Sources::default() }).unwrap();
        let mut reader = Reader::new(&settings);
        config(&mut reader);
        reader.finish().map_or_else(|problems| problems.to_string(), |()| String::new())
    }

    #[test]
    fn every_field_that_does_not_fit_is_named() {
        for (entry, part) in [
            ("{ expression = '* * * * *' }", "cron.schedules[0] "),
            ("{ expression = '* * * * *' }", "wanted the field name"),
            ("{ name = 'a', expression = '61 * * * *' }", "cron.schedules[0].expression = \"61 * * * *\""),
            ("{ name = 'a', expression = '61 * * * *' }", "the minute 61 cannot be read"),
            ("{ name = 'a', zone = 'Mars' }", "cron.schedules[0].zone = \"Mars\""),
            ("{ name = 'X y', expression = '* * * * *' }", "cron.schedules[0].name = \"X y\""),
            ("'nightly'", "wanted a table"),
            ("{ name = 3 }", "cron.schedules[0].name = 3"),
            ("{ name = 3 }", "wanted text, not 3"),
            ("{ name = 'a', expresion = '1' }", "cron.schedules[0].expresion = \"***\""),
            ("{ name = 'a', expresion = '1' }", "wanted one of name, expression"),
            ("{ name = 'a', misfire = 'retry' }", "cron.schedules[0].misfire = \"retry\""),
            ("{ name = 'a', misfire = 'retry' }", "wanted one of skip, coalesce, catch_up"),
            ("{ name = 'a', jitter = 'soon' }", "cron.schedules[0].jitter = \"soon\""),
            ("{ name = 'a', jitter = '30h' }", "wanted at most 24h"),
            ("{ name = 'a', from = 'tomorrow' }", "wanted a time such as"),
            ("{ name = 'a', grace = '1m' }", "wanted misfire = \"skip\" beside it"),
            ("{ name = 'a', misfire = 'catch_up', catch_up = 501 }", "wanted a whole number from 1 to 500"),
            (
                "{ name = 'a', from = 2027-01-02T00:00:00Z, until = 2027-01-01T00:00:00Z }",
                "cron.schedules[0].until",
            ),
            ("{ name = 'a' }, { name = 'a' }", "cron.schedules[1].name = \"a\""),
        ] {
            let found = problems(&format!("[{entry}]"));
            assert!(found.contains(part), "{entry}: {found}");
        }
        let all = "{ name = 'a', expression = '5 4 * * SUN', zone = 'Europe/Berlin', job = 'x', payload = { a = 1 },
            misfire = 'catch_up', catch_up = 3, catch_up_within = '2h', overlap = 'cancel_other', jitter = '30s',
            from = 2027-01-01T00:00:00Z, until = '2028-01-01T00:00:00Z', paused = true }";
        assert_eq!(problems(&format!("[{}]", all.replace('\n', " "))), "");
    }
}
