//! Lets requests in: looks the model up, tokenises, checks limits and predicted wait, and hands
//! over a ticket. Knows no HTTP and no engine, only the inbox.
