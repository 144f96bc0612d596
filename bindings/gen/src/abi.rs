//! The C ABI as data, read from the Rust that defines it: what every raw layer is written from.

use quote::ToTokens;
use std::path::PathBuf;

/// A type as C sees it.
#[derive(Clone, PartialEq)]
pub enum Type {
    Void,
    Char,
    /// i32, u64, f32, usize, an alias or a struct.
    Named(String),
    Pointer {
        to: Box<Type>,
        constant: bool,
    },
    Array {
        of: Box<Type>,
        n: usize,
    },
}

pub struct Constant {
    pub name: String,
    pub value: i64,
    pub doc: Vec<String>,
}

pub struct Field {
    pub name: String,
    pub ty: Type,
}

pub struct Struct {
    pub name: String,
    pub fields: Vec<Field>,
}

pub struct Function {
    pub name: String,
    pub parameters: Vec<Field>,
    pub result: Type,
}

#[derive(Default)]
pub struct Abi {
    pub constants: Vec<Constant>,
    /// Integers under another name (akv_status).
    pub aliases: Vec<(String, Type)>,
    /// Function pointers.
    pub callbacks: Vec<String>,
    /// What handles point to.
    pub opaque: Vec<String>,
    pub structs: Vec<Struct>,
    pub functions: Vec<Function>,
}

impl Abi {
    pub fn read(files: &[PathBuf]) -> Abi {
        let mut abi = Abi::default();
        for path in files {
            let text = std::fs::read_to_string(path).expect("a source");
            for item in syn::parse_file(&text).expect("Rust").items {
                abi.add(item);
            }
        }
        abi
    }

    fn add(&mut self, item: syn::Item) {
        match item {
            syn::Item::Const(c) if c.ident.to_string().starts_with("AKV_") => self.constants.push(Constant {
                name: c.ident.to_string(),
                value: value(&c.expr),
                doc: documentation(&c.attrs),
            }),
            syn::Item::Type(t) if is_public(&t.vis) => match &*t.ty {
                syn::Type::Path(p) if p.path.segments[0].ident == "Option" => self.callbacks.push(t.ident.to_string()),
                ty => self.aliases.push((t.ident.to_string(), parse(ty))),
            },
            syn::Item::Struct(s) if s.ident.to_string().starts_with("akv_") => {
                let fields: Vec<Field> = s
                    .fields
                    .iter()
                    .filter(|f| is_public(&f.vis))
                    .map(|f| Field { name: f.ident.as_ref().expect("a name").to_string(), ty: parse(&f.ty) })
                    .collect();
                match fields.is_empty() {
                    true => self.opaque.push(s.ident.to_string()),
                    false => self.structs.push(Struct { name: s.ident.to_string(), fields }),
                }
            }
            syn::Item::Fn(f) if f.sig.abi.is_some() && is_public(&f.vis) => self.functions.push(Function {
                name: f.sig.ident.to_string(),
                parameters: f
                    .sig
                    .inputs
                    .iter()
                    .filter_map(|input| match input {
                        syn::FnArg::Typed(p) => {
                            Some(Field { name: p.pat.to_token_stream().to_string(), ty: parse(&p.ty) })
                        }
                        syn::FnArg::Receiver(_) => None,
                    })
                    .collect(),
                result: match &f.sig.output {
                    syn::ReturnType::Default => Type::Void,
                    syn::ReturnType::Type(_, ty) => parse(ty),
                },
            }),
            _ => {}
        }
    }

    /// The functions, a line each, in the alphabet's order.
    pub fn symbols(&self) -> String {
        let mut names: Vec<_> = self.functions.iter().map(|f| f.name.clone() + "\n").collect();
        names.sort();
        names.concat()
    }

    /// A pointer to an object of the library: a number that nobody may dereference.
    pub fn is_handle(&self, ty: &Type) -> bool {
        matches!(ty, Type::Pointer { to, .. } if matches!(&**to, Type::Named(n) if self.opaque.contains(n)))
    }

    /// Offsets of the fields and the size, of a struct without padding: the rule of `src/capi/types.rs`.
    pub fn layout(&self, s: &Struct) -> (Vec<usize>, usize) {
        let mut at = 0;
        let offsets = s.fields.iter().map(|f| {
            let offset = at;
            at += self.size(&f.ty);
            offset
        });
        (offsets.collect(), at)
    }

    fn size(&self, ty: &Type) -> usize {
        match ty {
            Type::Void | Type::Char => 1,
            Type::Pointer { .. } => 8,
            Type::Array { of, n } => n * self.size(of),
            Type::Named(name) => match name.as_str() {
                "u8" => 1,
                "u32" | "i32" | "f32" | "c_int" => 4,
                "u64" | "i64" | "usize" => 8,
                name => {
                    if self.callbacks.iter().any(|c| c == name) {
                        return 8;
                    }
                    if let Some((_, ty)) = self.aliases.iter().find(|(alias, _)| alias == name) {
                        return self.size(ty);
                    }
                    let s = self.structs.iter().find(|s| s.name == name).unwrap_or_else(|| panic!("what is {name}?"));
                    self.layout(s).1
                }
            },
        }
    }
}

impl Type {
    pub fn is(&self, name: &str) -> bool {
        matches!(self, Type::Named(n) if n == name)
    }
}

fn is_public(visibility: &syn::Visibility) -> bool {
    matches!(visibility, syn::Visibility::Public(_))
}

fn parse(ty: &syn::Type) -> Type {
    match ty {
        syn::Type::Ptr(p) => Type::Pointer { to: Box::new(parse(&p.elem)), constant: p.const_token.is_some() },
        syn::Type::Array(a) => Type::Array { of: Box::new(parse(&a.elem)), n: value(&a.len) as usize },
        syn::Type::Path(p) => match p.path.segments.last().expect("a name").ident.to_string().as_str() {
            "c_void" => Type::Void,
            "c_char" => Type::Char,
            name => Type::Named(name.to_owned()),
        },
        ty => panic!("no C type: {}", ty.to_token_stream()),
    }
}

fn value(expr: &syn::Expr) -> i64 {
    match expr {
        syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Int(n), .. }) => n.base10_parse().expect("an integer"),
        syn::Expr::Unary(syn::ExprUnary { op: syn::UnOp::Neg(_), expr, .. }) => -value(expr),
        syn::Expr::Path(p) if p.to_token_stream().to_string() == "u32 :: MAX" => u32::MAX.into(),
        expr => panic!("no constant: {}", expr.to_token_stream()),
    }
}

/// Lines of documentation, without headings and Rust's safety notes.
fn documentation(attributes: &[syn::Attribute]) -> Vec<String> {
    let lines = attributes.iter().filter_map(|a| match &a.meta {
        syn::Meta::NameValue(syn::MetaNameValue {
            path,
            value: syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }),
            ..
        }) if path.is_ident("doc") => Some(text.value().trim().to_owned()),
        _ => None,
    });
    let mut lines: Vec<String> = lines.take_while(|l| l != "# Safety").filter(|l| !l.starts_with("# ")).collect();
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    lines
}
