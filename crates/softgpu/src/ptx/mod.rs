//! PTX text to a checked syntax tree: scopes resolved, registers numbered, nothing ignored.

pub mod ast;
mod lexer;
mod parse;

pub use parse::parse;
