//! Tests of one lane's block accounting.
