//! Splits PTX text into words and punctuation, each with its line.

use super::ast::Ptx;
use crate::error::PtxError;

/// A token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tok<'a> {
    /// A name, number, directive or dotted opcode. `::` stays inside (`L1::evict_last`).
    Word(&'a str),
    /// A quoted string, without its quotes.
    Str(&'a str),
    /// One character of punctuation.
    Punct(char),
}

fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

/// All tokens of `text` with their 1-based lines.
pub fn lex(text: &str) -> Ptx<Vec<(Tok<'_>, u32)>> {
    let b = text.as_bytes();
    let mut out = Vec::with_capacity(b.len() / 4);
    let (mut i, mut line) = (0, 1u32);
    while i < b.len() {
        let c = b[i];
        let start = i;
        match c {
            b'\n' => {
                line += 1;
                i += 1;
            }
            c if c.is_ascii_whitespace() => i += 1,
            b'/' if b.get(i + 1) == Some(&b'/') => {
                while i < b.len() && b[i] != b'\n' {
                    i += 1;
                }
            }
            b'/' if b.get(i + 1) == Some(&b'*') => {
                let first = line;
                i += 2;
                loop {
                    match b.get(i) {
                        None => return Err(PtxError::new(first, "comment without an end", "/*")),
                        Some(b'*') if b.get(i + 1) == Some(&b'/') => break i += 2,
                        Some(b'\n') => line += 1,
                        Some(_) => {}
                    }
                    i += 1;
                }
            }
            b'"' => {
                i += 1;
                while i < b.len() && b[i] != b'"' && b[i] != b'\n' {
                    i += 1;
                }
                if b.get(i) != Some(&b'"') {
                    return Err(PtxError::new(line, "string without an end", &text[start..i]));
                }
                out.push((Tok::Str(&text[start + 1..i]), line));
                i += 1;
            }
            c if is_word(c) => {
                loop {
                    match b.get(i) {
                        Some(&c) if is_word(c) => i += 1,
                        Some(b':') if b.get(i + 1) == Some(&b':') => i += 2,
                        _ => break,
                    }
                }
                out.push((Tok::Word(&text[start..i]), line));
            }
            b',' | b';' | b'{' | b'}' | b'[' | b']' | b'(' | b')' | b'<' | b'>' | b'+' | b'-'
            | b'|' | b'!' | b'@' | b'=' | b':' => {
                out.push((Tok::Punct(c as char), line));
                i += 1;
            }
            _ => {
                let ch = text[i..].chars().next().unwrap_or('?');
                return Err(PtxError::new(
                    line,
                    "character that PTX does not use",
                    &ch.to_string(),
                ));
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_keep_dots_and_double_colons_and_lines_count() {
        let t = lex("ld.global.L1::evict_last.u32 %r1, [%rd2+4]; // x\n/* a\nb */ $L:").unwrap();
        let w: Vec<_> = t.iter().map(|(t, l)| (*t, *l)).collect();
        assert_eq!(w[0], (Tok::Word("ld.global.L1::evict_last.u32"), 1));
        assert_eq!(w[1], (Tok::Word("%r1"), 1));
        assert_eq!(w[4], (Tok::Word("%rd2"), 1));
        assert_eq!(w[5], (Tok::Punct('+'), 1));
        assert_eq!(w[9], (Tok::Word("$L"), 3));
        assert_eq!(w[10], (Tok::Punct(':'), 3));
    }

    #[test]
    fn refuses_stray_characters_and_open_comments() {
        assert!(lex("add # 1").is_err());
        assert!(lex("/* x").is_err());
        assert!(lex("\"x\n").is_err());
    }
}
