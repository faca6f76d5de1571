// Read [{tex, display}, ...] from standard input, write for each the message of KaTeX's strict parser, or null.
const katex = require(require.resolve("katex", { paths: [process.argv[2]] }));
const equations = JSON.parse(require("fs").readFileSync(0, "utf8"));
const message = ({ tex, display }) => {
  try {
    katex.renderToString(tex, { displayMode: display, strict: "error", throwOnError: true });
    return null;
  } catch (error) {
    return error.message;
  }
};
console.log(JSON.stringify(equations.map(message)));
