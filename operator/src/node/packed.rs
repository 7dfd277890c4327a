//! Objects as the caches keep them: the fields that are read, as text. What is parsed from it takes five times as much,
//! most of it empty fields and half-filled tree nodes, and there are thousands.

use std::{fmt, marker::PhantomData};

use basal_objects::object::Object;
use serde_json::{Map, Value};

/// What is read of an object.
pub trait Facts: Sized {
    /// The fields, as JSON pointers; none lies in another one.
    const FIELDS: &[&str];

    /// Reads an object that has at least these fields.
    ///
    /// # Errors
    /// The field that does not parse.
    fn parse(object: &Object) -> Result<Self, String>;
}

/// The fields of an object that a `T` is read from.
pub struct Packed<T> {
    text: Box<[u8]>,
    facts: PhantomData<fn() -> T>,
}

impl<T: Facts> Packed<T> {
    /// Packs an object.
    ///
    /// # Errors
    /// The field that does not parse.
    pub fn new(object: &Object) -> Result<Self, String> {
        T::parse(object)?;
        let mut fields = Value::Object(Map::new());
        for pointer in T::FIELDS {
            if let Some(value) = object.0.pointer(pointer) {
                put(&mut fields, pointer, value.clone());
            }
        }
        Ok(Self { text: fields.to_string().into_bytes().into(), facts: PhantomData })
    }

    /// What is read of the object.
    ///
    /// # Errors
    /// None, as far as the fields of `T` are those that it reads: the object parsed before.
    pub fn facts(&self) -> Result<T, String> {
        let fields = serde_json::from_slice(&self.text).map_err(|error| error.to_string())?;
        T::parse(&Object(fields))
    }
}

impl<T> fmt::Debug for Packed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.text))
    }
}

/// Puts a value where a pointer points to, making the objects on the way.
fn put(fields: &mut Value, pointer: &str, value: Value) {
    let mut place = fields;
    for name in pointer.split('/').skip(1) {
        place = &mut place[name];
    }
    *place = value;
}
