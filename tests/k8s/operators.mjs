// Checks operators' objects by the rules of their own definitions: patterns, ranges, what is
// required. Reads [[class, module, object]] as JSON from standard input, prints problems. Unknown
// fields are the type checker's part.

import { readFileSync } from "node:fs";

for (const [name, module, object] of JSON.parse(readFileSync(0, "utf8"))) {
  const models = await import(`${process.argv[2]}/node_modules/${module}.js`);
  try {
    new models[name](object).validate();
  } catch (error) {
    console.log(`${name} ${object.metadata?.name}: ${error.message}`);
  }
}
