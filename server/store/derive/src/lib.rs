//! The derive macro `FromRow`, which `perennial_store::pool::sql` exports and describes.

use proc_macro::TokenStream;
use quote::quote;
use syn::spanned::Spanned;
use syn::{Data, DeriveInput, Error, Field, Fields, LitStr, Path, Result, parse_macro_input, parse_quote};

/// Reads a struct from a row: each field is the column with its name.
#[proc_macro_derive(FromRow, attributes(row))]
pub fn from_row(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    implementation(&input).unwrap_or_else(|error| error.to_compile_error()).into()
}

fn implementation(input: &DeriveInput) -> Result<proc_macro2::TokenStream> {
    let Data::Struct(data) = &input.data else {
        return Err(Error::new(input.span(), "FromRow can be derived for a struct with named fields"));
    };
    let Fields::Named(fields) = &data.fields else {
        return Err(Error::new(
            input.span(),
            "FromRow needs named fields: their names are those of the columns",
        ));
    };
    let sql = crate_path(input)?;
    let read = fields.named.iter().map(|field| read_field(field, &sql)).collect::<Result<Vec<_>>>()?;
    let name = &input.ident;
    let (generics, types, conditions) = input.generics.split_for_impl();
    Ok(quote! {
        impl #generics #sql::FromRow for #name #types #conditions {
            fn from_row(row: &#sql::Row) -> #sql::Result<Self> {
                ::core::result::Result::Ok(Self { #(#read,)* })
            }
        }
    })
}

/// The module with the traits: `#[row(crate = path)]` names it where it has another path.
fn crate_path(input: &DeriveInput) -> Result<Path> {
    let mut path = parse_quote!(::perennial::sql);
    for attribute in input.attrs.iter().filter(|attribute| attribute.path().is_ident("row")) {
        attribute.parse_nested_meta(|meta| {
            if !meta.path.is_ident("crate") {
                return Err(meta.error("wanted crate = path::to::sql"));
            }
            path = meta.value()?.parse()?;
            Ok(())
        })?;
    }
    Ok(path)
}

/// The attributes of a field.
#[derive(Default)]
struct Attributes {
    rename: Option<String>,
    is_json: bool,
    has_default: bool,
}

fn attributes(field: &Field) -> Result<Attributes> {
    let mut found = Attributes::default();
    for attribute in field.attrs.iter().filter(|attribute| attribute.path().is_ident("row")) {
        attribute.parse_nested_meta(|meta| {
            if meta.path.is_ident("rename") {
                found.rename = Some(meta.value()?.parse::<LitStr>()?.value());
            } else if meta.path.is_ident("json") {
                found.is_json = true;
            } else if meta.path.is_ident("default") {
                found.has_default = true;
            } else {
                return Err(meta.error("wanted rename = \"column\", json or default"));
            }
            Ok(())
        })?;
    }
    Ok(found)
}

fn read_field(field: &Field, sql: &Path) -> Result<proc_macro2::TokenStream> {
    let Attributes { rename, is_json, has_default } = attributes(field)?;
    let (name, kind) = (field.ident.as_ref(), &field.ty);
    let column = rename.unwrap_or_else(|| name.map(ToString::to_string).unwrap_or_default());
    let column = column.strip_prefix("r#").unwrap_or(&column);
    let read = if is_json {
        quote! { row.get::<#sql::AsJson<#kind>>(#column)?.0 }
    } else {
        quote! { row.get::<#kind>(#column)? }
    };
    Ok(if has_default {
        quote! {
            #name: if row.value(#column).is_none_or(#sql::Value::is_null) {
                ::core::default::Default::default()
            } else {
                #read
            }
        }
    } else {
        quote! { #name: #read }
    })
}
