//! One source file with many of its mutants in it, each behind a switch.
//!
//! `a < b` becomes `(if is(7) { a > b } else if is(8) { a == b } else { a < b })`:
//! with every switch off the program is what it was, and no mutant needs a build
//! of its own. A `const fn` loses its `const` for that, unless a constant needs it.
//! An operator keeps its operands: of `a || b || c` that is `(a || b) && c`, where the
//! text alone would be `a || b && c`.
//! What cannot be said like that (what a constant needs, in a chain of `let`s, a field
//! of a structure) is left to cargo-mutants.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use anyhow::Context;
use proc_macro2::LineColumn;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use crate::list::{Genre, Mutant, Place};

/// How the program asks whether a switch is on.
const SWITCH: &str = "crate::mutant_switch::is";

/// A source file with its mutants.
#[derive(Debug, Default)]
pub struct Woven {
    pub text: String,
    /// What of `text` is there for mutants.
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    /// In bytes.
    range: Range<usize>,
    mutants: Vec<usize>,
    /// It is what the only mutant puts there, and not what it stands in.
    is_variant: bool,
}

/// Whom a complaint of the compiler concerns.
#[derive(Debug, PartialEq, Eq)]
pub enum Blame<'a> {
    /// This mutant is wrong by itself.
    Variant(usize),
    /// These cannot be switched here.
    Switch(&'a [usize]),
    Nobody,
}

impl Woven {
    /// Whom a complaint about a part of the text concerns: those of the smallest part
    /// around it.
    pub fn blame(&self, bytes: &Range<usize>) -> Blame<'_> {
        let around = self
            .parts
            .iter()
            .filter(|part| part.range.start <= bytes.start && bytes.end <= part.range.end);
        match around.min_by_key(|part| part.range.len()) {
            Some(part) if part.is_variant => Blame::Variant(part.mutants[0]),
            Some(part) => Blame::Switch(&part.mutants),
            None => Blame::Nobody,
        }
    }

    /// Every mutant that is in it.
    pub fn mutants(&self) -> impl Iterator<Item = usize> {
        self.parts.iter().flat_map(|part| part.mutants.clone())
    }
}

/// Puts those of `mutants` (with their numbers) that can be expressed into `source`.
/// Functions with the names of `constant` are evaluated at compile time.
pub fn weave(
    source: &str,
    mutants: &[(usize, &Mutant)],
    constant: &BTreeSet<String>,
) -> anyhow::Result<Woven> {
    let file = syn::parse_file(source).context("cannot be parsed")?;
    let mut finder = Finder {
        lines: line_starts(source),
        source,
        wanted: HashMap::new(),
        edits: Vec::new(),
        constant,
        const_depth: 0,
    };
    for &(number, mutant) in mutants {
        let at = (mutant.genre as u8, mutant.span.start);
        finder.wanted.entry(at).or_default().push((number, mutant));
    }
    finder.visit_file(&file);
    let mut edits = finder.edits;
    // Outer ones first; of those with the same extent the one found first.
    edits.sort_by_key(|edit| (edit.range.start, usize::MAX - edit.range.end));
    let mut woven = Woven::default();
    render(source, 0..source.len(), &edits, 0, &mut woven);
    Ok(woven)
}

/// A part of the source that is replaced.
struct Edit {
    range: Range<usize>,
    pieces: Vec<Piece>,
    mutants: Vec<usize>,
}

enum Piece {
    /// There for a mutant, or for all of the edit.
    Text(String, Option<usize>),
    /// What the source has there, with the edits inside it.
    Source(Range<usize>),
}

fn render(source: &str, range: Range<usize>, edits: &[Edit], from: usize, woven: &mut Woven) {
    let mut at = range.start;
    for (index, edit) in edits.iter().enumerate().skip(from) {
        if edit.range.start < at || edit.range.end > range.end {
            if edit.range.start >= range.end {
                break;
            }
            continue;
        }
        woven.text.push_str(&source[at..edit.range.start]);
        let start = woven.text.len();
        for piece in &edit.pieces {
            let start = woven.text.len();
            match piece {
                Piece::Text(text, mutant) => {
                    woven.text.push_str(text);
                    if let Some(mutant) = mutant {
                        woven.parts.push(Part {
                            range: start..woven.text.len(),
                            mutants: vec![*mutant],
                            is_variant: true,
                        });
                    }
                }
                Piece::Source(inner) => {
                    render(source, inner.clone(), edits, index + 1, woven);
                }
            }
        }
        woven.parts.push(Part {
            range: start..woven.text.len(),
            mutants: edit.mutants.clone(),
            is_variant: false,
        });
        at = edit.range.end;
    }
    woven.text.push_str(&source[at..range.end]);
}

fn line_starts(source: &str) -> Vec<usize> {
    let ends = source.match_indices('\n').map(|(at, _)| at + 1);
    std::iter::once(0).chain(ends).collect()
}

type Numbered<'a> = (usize, &'a Mutant);

struct Finder<'a> {
    source: &'a str,
    lines: Vec<usize>,
    /// By genre and start.
    wanted: HashMap<(u8, Place), Vec<Numbered<'a>>>,
    edits: Vec<Edit>,
    constant: &'a BTreeSet<String>,
    /// Inside so many functions and items that are evaluated at compile time.
    const_depth: u32,
}

impl<'a> Finder<'a> {
    fn offset(&self, at: LineColumn) -> usize {
        let line = self.lines[at.line - 1];
        let text = &self.source[line..];
        let within = text.char_indices().nth(at.column);
        line + within.map_or(text.len(), |(offset, _)| offset)
    }

    fn range(&self, what: &impl Spanned) -> Range<usize> {
        let span = what.span();
        self.offset(span.start())..self.offset(span.end())
    }

    fn take(&mut self, genre: Genre, at: LineColumn) -> Vec<Numbered<'a>> {
        if self.const_depth > 0 {
            return Vec::new();
        }
        let place = Place {
            line: at.line,
            column: at.column + 1,
        };
        let found = self.wanted.remove(&(genre as u8, place));
        found.unwrap_or_default()
    }

    /// `if is(1) { variant } else if … else { original }`, in parentheses.
    fn choose(
        &mut self,
        range: Range<usize>,
        mutants: &[Numbered<'a>],
        variant: impl Fn(&str) -> Vec<Piece>,
        original: &str,
    ) {
        if mutants.is_empty() {
            return;
        }
        let mut pieces = vec![Piece::Text("(".into(), None)];
        for &(number, mutant) in mutants {
            let test = format!("if {SWITCH}({number}) {{ ");
            pieces.push(Piece::Text(test, Some(number)));
            for piece in variant(&mutant.replacement) {
                pieces.push(match piece {
                    Piece::Text(text, _) => Piece::Text(text, Some(number)),
                    source => source,
                });
            }
            pieces.push(Piece::Text(" } else ".into(), Some(number)));
        }
        pieces.push(Piece::Text("{ ".into(), None));
        pieces.extend(variant(original));
        pieces.push(Piece::Text(" })".into(), None));
        let mutants = mutants.iter().map(|(number, _)| *number).collect();
        self.edits.push(Edit {
            range,
            pieces,
            mutants,
        });
    }

    fn function(
        &mut self,
        signature: &syn::Signature,
        body: &syn::Block,
        visit: impl FnOnce(&mut Self),
    ) {
        let mut is_const = false;
        if let Some(constness) = &signature.constness {
            is_const = self.constant.contains(&signature.ident.to_string());
            if !is_const {
                self.edits.push(Edit {
                    range: self.range(constness),
                    pieces: Vec::new(),
                    mutants: Vec::new(),
                });
            }
        }
        self.const_depth += u32::from(is_const);
        if !returns_impl(signature)
            && let Some(first) = body.stmts.first()
        {
            for (number, mutant) in self.take(Genre::FnValue, first.span().start()) {
                let at = self.offset(body.brace_token.span.open().end());
                let value = &mutant.replacement;
                let text = format!(" if {SWITCH}({number}) {{ return {value}; }} ");
                self.edits.push(Edit {
                    range: at..at,
                    pieces: vec![Piece::Text(text, Some(number))],
                    mutants: vec![number],
                });
            }
        }
        visit(self);
        self.const_depth -= u32::from(is_const);
    }
}

impl<'ast> Visit<'ast> for Finder<'_> {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function(&item.sig, &item.block, |this| {
            visit::visit_item_fn(this, item);
        });
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.function(&item.sig, &item.block, |this| {
            visit::visit_impl_item_fn(this, item);
        });
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(body) = &item.default {
            self.function(&item.sig, body, |this| {
                visit::visit_trait_item_fn(this, item);
            });
        }
    }

    // Evaluated at compile time.
    fn visit_item_const(&mut self, _: &'ast syn::ItemConst) {}
    fn visit_item_static(&mut self, _: &'ast syn::ItemStatic) {}
    fn visit_impl_item_const(&mut self, _: &'ast syn::ImplItemConst) {}
    fn visit_trait_item_const(&mut self, _: &'ast syn::TraitItemConst) {}
    fn visit_type(&mut self, _: &'ast syn::Type) {}
    fn visit_expr_repeat(&mut self, repeat: &'ast syn::ExprRepeat) {
        self.visit_expr(&repeat.expr);
    }

    fn visit_expr_binary(&mut self, binary: &'ast syn::ExprBinary) {
        if !contains_let(&binary.left) && !contains_let(&binary.right) {
            let mutants = self.take(Genre::BinaryOperator, binary.op.span().start());
            let (left, right) = (self.range(&binary.left), self.range(&binary.right));
            let operator = self.source[self.range(&binary.op)].to_owned();
            let variant = |operator: &str| {
                vec![
                    Piece::Source(left.clone()),
                    Piece::Text(format!(" {operator} "), None),
                    Piece::Source(right.clone()),
                ]
            };
            self.choose(left.start..right.end, &mutants, variant, &operator);
        }
        visit::visit_expr_binary(self, binary);
    }

    fn visit_expr_unary(&mut self, unary: &'ast syn::ExprUnary) {
        let mutants = self.take(Genre::UnaryOperator, unary.op.span().start());
        let (range, inner) = (self.range(unary), self.range(&unary.expr));
        let operator = self.source[range.start..inner.start].to_owned();
        let variant = |operator: &str| {
            vec![
                Piece::Text(operator.to_owned(), None),
                Piece::Source(inner.clone()),
            ]
        };
        self.choose(range, &mutants, variant, &operator);
        visit::visit_expr_unary(self, unary);
    }

    /// An arm that may be away makes a `match` incomplete if no other arm has what it
    /// has; the compiler then complains about what is matched.
    fn visit_expr_match(&mut self, expression: &'ast syn::ExprMatch) {
        let arms = expression.arms.iter().map(|arm| arm.span().start());
        let places = arms.map(|at| Place {
            line: at.line,
            column: at.column + 1,
        });
        let deletions: Vec<usize> = places
            .filter_map(|at| self.wanted.get(&(Genre::MatchArm as u8, at)))
            .flatten()
            .map(|(number, _)| *number)
            .collect();
        let range = self.range(&expression.expr);
        if !deletions.is_empty() {
            self.edits.push(Edit {
                range: range.clone(),
                pieces: vec![Piece::Source(range)],
                mutants: deletions,
            });
        }
        visit::visit_expr_match(self, expression);
    }

    fn visit_arm(&mut self, arm: &'ast syn::Arm) {
        let deletions = self.take(Genre::MatchArm, arm.span().start());
        match &arm.guard {
            Some((_, guard)) => {
                let is_plain = !contains_let(guard);
                let mutants = self.take(Genre::MatchArmGuard, guard.span().start());
                if is_plain && !(mutants.is_empty() && deletions.is_empty()) {
                    self.change_guard(self.range(guard), &mutants, &deletions);
                }
            }
            None if !deletions.is_empty() => {
                let at = self.offset(arm.pat.span().end());
                let numbers: Vec<_> = deletions.iter().map(|(number, _)| *number).collect();
                let off = numbers.iter().map(|number| format!("!{SWITCH}({number})"));
                let guard = format!(" if {}", off.collect::<Vec<_>>().join(" && "));
                self.edits.push(Edit {
                    range: at..at,
                    pieces: vec![Piece::Text(guard, numbers.first().copied())],
                    mutants: numbers,
                });
            }
            None => {}
        }
        visit::visit_arm(self, arm);
    }
}

impl<'a> Finder<'a> {
    /// Of an arm that has a guard.
    fn change_guard(
        &mut self,
        guard: Range<usize>,
        mutants: &[Numbered<'a>],
        deletions: &[Numbered<'a>],
    ) {
        let mut test = String::from("(");
        for (number, _) in deletions {
            test += &format!("!{SWITCH}({number}) && ");
        }
        test += "(";
        let mut end = String::from(")");
        for (number, mutant) in mutants {
            if mutant.replacement == "true" {
                test += &format!("{SWITCH}({number}) || ");
            } else {
                end += &format!(" && !{SWITCH}({number})");
            }
        }
        let all = deletions.iter().chain(mutants);
        self.edits.push(Edit {
            range: guard.clone(),
            pieces: vec![
                Piece::Text(test + "((", None),
                Piece::Source(guard),
                Piece::Text(end + ")))", None),
            ],
            mutants: all.map(|(number, _)| *number).collect(),
        });
    }
}

/// Whether all values that it returns must be of one type that has no name.
fn returns_impl(signature: &syn::Signature) -> bool {
    struct Search(bool);
    impl Visit<'_> for Search {
        fn visit_type_impl_trait(&mut self, _: &syn::TypeImplTrait) {
            self.0 = true;
        }
    }
    let mut search = Search(false);
    search.visit_return_type(&signature.output);
    search.0
}

/// Whether it is a chain of conditions with a `let` in it.
fn contains_let(expression: &syn::Expr) -> bool {
    match expression {
        syn::Expr::Let(_) => true,
        syn::Expr::Binary(binary) => contains_let(&binary.left) || contains_let(&binary.right),
        _ => false,
    }
}
