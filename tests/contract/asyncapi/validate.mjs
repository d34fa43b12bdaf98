// Validates an AsyncAPI file with the official parser: node validate.mjs FILE
// Exit code 1 on any error; warnings are printed.
import { readFileSync } from "node:fs";
import { Parser } from "@asyncapi/parser";

const file = process.argv[2];
const { document, diagnostics } = await new Parser().parse(readFileSync(file, "utf8"));
const errors = diagnostics.filter((each) => each.severity === 0);
for (const each of diagnostics) {
  const where = `${file}:${each.range.start.line + 1}`;
  console.log(`${where}: ${each.severity === 0 ? "error" : "note"}: ${each.message} (${each.code})`);
}
if (errors.length > 0 || document === undefined) {
  console.error(`${file}: ${errors.length} errors`);
  process.exit(1);
}
console.log(`${file}: valid AsyncAPI ${document.version()}, ${document.channels().all().length} channels`);
