//! Whether something that may make a program faster or slower does, found out while it runs.

use std::time::Duration;

/// Has something done and left out by turns, and then whichever took less time.
#[derive(Debug)]
pub struct Trial {
    turn: u32,
    /// The least time of a turn, with it left out and done: others disturb a turn, and never shorten it.
    least: [Duration; 2],
}

impl Trial {
    /// Turns to find out in, every other one of which it is done.
    const TURNS: u32 = 4;

    /// Nothing is known yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { turn: 0, least: [Duration::MAX; 2] }
    }

    /// Whether it is to be done at this turn.
    #[must_use]
    pub fn is_on(&self) -> bool {
        let [without, with] = self.least;
        if self.turn < Self::TURNS { self.turn.is_multiple_of(2) } else { with <= without }
    }

    /// Ends a turn, which took so long.
    pub fn note(&mut self, took: Duration) {
        if self.turn < Self::TURNS {
            let least = &mut self.least[usize::from(self.is_on())];
            *least = took.min(*least);
            self.turn += 1;
        }
    }
}

impl Default for Trial {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_ends_with_what_took_less_time() {
        for (with, without, is_on) in [(2, 3, true), (3, 2, false), (2, 2, true)] {
            let mut trial = Trial::new();
            // one turn of each was disturbed
            for (turn, disturbance) in [(true, 0), (false, 0), (true, 9), (false, 9)] {
                assert_eq!(trial.is_on(), turn);
                let took = if turn { with } else { without };
                trial.note(Duration::from_micros(took + disturbance));
            }
            for took in [1, 9, 1] {
                assert_eq!(trial.is_on(), is_on, "{with} with, {without} without");
                trial.note(Duration::from_micros(took)); // nothing is tried any more
            }
        }
    }
}
